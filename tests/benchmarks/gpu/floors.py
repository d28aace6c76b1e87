"""What a GPU can do at best, and what every operation must at least move and compute."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpu.device import Gpu, Run
from gpu.measuring import interleaved
from orthotrain.kernels.permutations import GROUPS
from orthotrain.kernels.skew import skew

BLOCKS = 1000
"""Blocks of a parameterization: about those of a network of 8B parameters at b = 256, in a few launches."""


class Pass(NamedTuple):
    """One direction of an operation: what runs, its least bytes and FLOPs, and which products it forms."""

    run: Run
    moved: int
    flops: int = 0
    products: str = "bf16"


Passes = dict[str, Pass]


def ceilings(machine: Gpu) -> dict[str, float]:
    """Measure bytes a second of a large copy, FLOPs a second of large products in bf16, TF32 and fp32.

    Products with the accuracy of fp32 are three of TF32 (``tf32x3``).
    """
    size, device = machine.pick(8192, 64), machine.device
    source = torch.empty(8 * size * size, dtype=torch.bfloat16, device=device)
    target, wide = torch.empty_like(source), torch.randn(size, size, device=device)
    half = wide.bfloat16()
    times = interleaved(machine, {"copy": lambda: target.copy_(source), "bf16": lambda: half @ half}, rounds=10)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        times |= interleaved(machine, {"tf32": lambda: wide @ wide}, rounds=6)
    finally:
        torch.set_float32_matmul_precision(before)
    rate = {name: 2 * size**3 / (1e-3 * times[name]["ms"]) for name in ("bf16", "tf32")}
    return {
        "bandwidth": 2 * source.numel() * 2 / (1e-3 * times["copy"]["ms"]),
        "bf16": rate["bf16"],
        "tf32": rate["tf32"],
        "tf32x3": rate["tf32"] / 3,
    }


def operations(machine: Gpu) -> Iterator[tuple[str, Callable[[], Passes]]]:
    """Yield name and passes of every operation but rotations; its operands are made when it is asked for."""
    for size in (256, 32, 64):
        for name in ("cayley_neumann", "exponential", "cayley", "skew"):
            if name != "cayley" or size <= 64:
                yield f"{name} b={size}", partial(parameterization, name, size, machine)
    for width, size in ((4096, 256), (4096, 32), (1024, 64)):
        yield f"fold {width}x{width} b={size}", partial(folding, machine, width, size)
    yield "dequant int8 4096x4096", partial(unpacking_int8, machine, 4096)
    yield "dequant nf4 4096x4096", partial(unpacking_nf4, machine, 4096)


def parameterization(name: str, size: int, machine: Gpu) -> Passes:
    """Return both passes of a parameterization in fp32, of ``BLOCKS`` blocks with ||Q|| about 0.5."""
    from orthotrain.kernels.cayley import triton as exact
    from orthotrain.kernels.cayley_neumann import triton as neumann
    from orthotrain.kernels.exponential import triton as exponential
    from orthotrain.kernels.skew import triton as skewing

    blocks, device = machine.pick(BLOCKS, 2), machine.device
    half, block = blocks * size * (size - 1) // 2, blocks * size * size
    generators = torch.randn(blocks, half // blocks, device=device) * (0.25 / size**0.5)
    q, grad, product = skew(generators, size), torch.randn(blocks, size, size, device=device), 2 * size * block
    chains = neumann.forward_chain(4).products(), neumann.backward_chain(4).products()
    series = exponential.forward_chain().products(), exponential.backward_chain().products()
    generated = partial(neumann.cayley_neumann_forward, generators, size, 4, generators.dtype)
    # at this norm the iteration of cayley takes about 3 pairs of products, beside Q^2 and D
    forward: dict[str, tuple[Run, int, int]] = {
        "skew": (lambda: skewing.skew_forward(generators, size), half + block, 0),
        "cayley": (lambda: exact.cayley_forward(q), 2 * block, 8),
        "cayley_neumann": (generated, half + block, chains[0]),
        "exponential": (lambda: exponential.exponential_forward(q), 2 * block, series[0]),
    }
    returned = partial(neumann.cayley_neumann_backward, grad, generators, 4)
    backward: dict[str, tuple[Run, int, int]] = {
        "skew": (lambda: skewing.skew_backward(grad), half + block, 0),
        "cayley": (lambda: exact.cayley_backward(grad, q), 3 * block, 2),
        "cayley_neumann": (returned, 2 * half + block, chains[1]),
        "exponential": (lambda: exponential.exponential_backward(grad, q), 3 * block, series[1]),
    }
    passes = {"forward": forward[name], "backward": backward[name]}
    return {key: Pass(run, 4 * moved, count * product, "tf32x3") for key, (run, moved, count) in passes.items()}


def folding(machine: Gpu, width: int, size: int) -> Passes:
    """Return both passes of a fold of a square weight in bf16, permutations included."""
    from orthotrain.kernels.fold import triton

    width = machine.pick(width, 2 * size)
    draw = drawing(machine)
    weight, grad = draw(width, width), draw(width, width)
    d_out, d_in = draw(width // size, size, size), draw(width // size, size, size)
    rows, columns = (torch.randperm(width // GROUPS[0], device=machine.device) for _ in range(2))
    least, flops = 4 * width * width, 2 * width * width * 2 * size
    return {
        "forward": Pass(lambda: triton.fold_forward(weight, d_out, d_in, rows, columns), least, flops),
        "backward": Pass(lambda: triton.fold_backward(grad, weight, d_out, d_in, rows, columns), least, 2 * flops),
    }


def unpacking_int8(machine: Gpu, width: int) -> Passes:
    """Return the pass that unpacks a square int8 weight to bf16."""
    from orthotrain.kernels.dequant import triton

    width, device = machine.pick(width, 256), machine.device
    codes = torch.randint(-127, 128, (width, width), dtype=torch.int8, device=device)
    scales = torch.rand(width, width // 256, device=device)
    moved = codes.numel() + 4 * scales.numel() + 2 * width * width
    return {"forward": Pass(lambda: triton.dequant_int8_forward(codes, scales, torch.bfloat16), moved)}


def unpacking_nf4(machine: Gpu, width: int) -> Passes:
    """Return the pass that unpacks a square NF4 weight with double quantisation to bf16."""
    from orthotrain.kernels.dequant import triton

    width, device = machine.pick(width, 256), machine.device
    packed = torch.randint(0, 256, (width, width // 2), dtype=torch.uint8, device=device)
    groups = width * width // 64
    absmax = torch.randint(0, 256, (groups,), dtype=torch.uint8, device=device)
    nested = [torch.rand(count, device=device) for count in (-(-groups // 256), 1, 256)]
    moved = packed.numel() + groups + 4 * groups // 256 + 2 * width * width
    return {"forward": Pass(lambda: triton.dequant_nf4_forward(packed, absmax, nested, 64, torch.bfloat16), moved)}


def rotation(machine: Gpu, tokens: int, width: int, size: int, group: int | None) -> Passes:
    """Return both passes of a rotation in bf16, without autograd; permuted by groups, or not for None."""
    from orthotrain.kernels.block_rotate import triton

    tokens, width = machine.pick((tokens, width), (16, 2 * size))
    draw = drawing(machine)
    x, grad, displacement = draw(tokens, width), draw(tokens, width), draw(width // size, size, size)
    order = None if group is None else torch.randperm(width // group, device=machine.device)
    elements, flops, blocks = 2 * tokens * width, 2 * tokens * width * size, 2 * width * size

    def backward() -> Any:
        return triton.block_rotate_backward(grad, x, displacement, order, None)

    return {
        "forward": Pass(
            lambda: triton.block_rotate_forward(x, displacement, order, None), 2 * elements + blocks, flops
        ),
        "backward": Pass(backward, 3 * elements + 2 * blocks, 2 * flops),
    }


def drawing(machine: Gpu) -> Callable[..., Tensor]:
    """Return what draws bf16 tensors of a shape on the device."""
    return partial(_draw, machine.device)


def _draw(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device=device)
