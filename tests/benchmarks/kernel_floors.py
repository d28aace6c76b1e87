"""What a GPU can do at best, and what every operation must at least move and compute."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import kernel_cases as cases
import torch
from torch import Tensor

from orthotrain.kernels.groups import GROUPS
from orthotrain.kernels.skew import skew

Run = Callable[[], Any]
BLOCKS = 1000
"""Blocks of a parameterization: those of a network of 8B parameters at b = 256, in a few launches."""


class Ceilings(NamedTuple):
    """Measured bytes a second of a large copy, FLOPs a second of large products; tf32x3 is three products of TF32."""

    bandwidth: float
    bf16: float
    tf32x3: float


class Pass(NamedTuple):
    """One direction of an operation: what runs, its least bytes and FLOPs, and which products it forms."""

    run: Run
    moved: int
    flops: int = 0
    products: str = "bf16"

    def floor(self, ceilings: Ceilings) -> float:
        """Return the least milliseconds."""
        return 1e3 * max(self.moved / ceilings.bandwidth, self.flops / getattr(ceilings, self.products))


def measured_ceilings(device: torch.device, size: int = 8192) -> Ceilings:
    """Measure a copy and products in bf16 and TF32."""
    source = torch.empty(8 * size * size, dtype=torch.bfloat16, device=device)
    target, wide = torch.empty_like(source), torch.randn(size, size, device=device)
    half, before = wide.bfloat16(), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    runs = {"copy": lambda: target.copy_(source), "bf16": lambda: half @ half, "tf32": lambda: wide @ wide}
    ms = cases.interleaved(runs, device, rounds=10)
    torch.set_float32_matmul_precision(before)
    flops = {name: 2 * size**3 / (1e-3 * ms[name]) for name in ("bf16", "tf32")}
    return Ceilings(2 * source.numel() * 2 / (1e-3 * ms["copy"]), flops["bf16"], flops["tf32"] / 3)


def operations(device: torch.device) -> Iterator[tuple[str, Callable[[], dict[str, Pass]]]]:
    """Yield name and passes of every operation; its operands are made when it is asked for."""
    for size in (32, 64, 256):
        for name in ("cayley_neumann", "cayley_neumann_generators", "exponential", "cayley", "skew"):
            if name != "cayley" or size <= 64:
                yield f"{name} b={size}", lambda name=name, size=size: parameterization(name, size, device)
    for width, size in ((4096, 256), (4096, 32), (1024, 64)):
        yield f"fold {width}x{width} b={size}", lambda width=width, size=size: folding(width, size, device)
    yield "dequant int8 4096x4096", lambda: unpacking(4096, device)["int8"]
    yield "dequant nf4 4096x4096", lambda: unpacking(4096, device)["nf4"]


def parameterization(name: str, size: int, device: torch.device) -> dict[str, Pass]:
    """Return both passes of a parameterization in fp32, of ``BLOCKS`` blocks with ||Q|| about 0.5."""
    from orthotrain.kernels.cayley import triton as exact
    from orthotrain.kernels.cayley_neumann import triton as neumann
    from orthotrain.kernels.exponential import triton as exponential
    from orthotrain.kernels.skew import triton as skewing

    half, block = BLOCKS * size * (size - 1) // 2, BLOCKS * size * size
    generators = torch.randn(BLOCKS, half // BLOCKS, device=device) * (0.25 / size**0.5)
    q, grad, product = skew(generators, size), torch.randn(BLOCKS, size, size, device=device), 2 * size * block
    chains = neumann.forward_chain(4).products(), neumann.backward_chain(4).products()
    # at this norm the iteration of cayley takes about 3 pairs of products, beside Q^2 and D
    forward: dict[str, tuple[Run, int, int]] = {
        "skew": (lambda: skewing.skew_forward(generators, size), half + block, 0),
        "cayley": (lambda: exact.cayley_forward(q), 2 * block, 8),
        "cayley_neumann": (lambda: neumann.cayley_neumann_forward(q, 4), 2 * block, chains[0]),
        "cayley_neumann_generators": (
            lambda: neumann.cayley_neumann_generators_forward(generators, size, 4),
            half + block,
            chains[0],
        ),
        "exponential": (
            lambda: exponential.exponential_forward(q),
            2 * block,
            exponential.forward_chain().products(),
        ),
    }
    backward: dict[str, tuple[Run, int, int]] = {
        "skew": (lambda: skewing.skew_backward(grad), half + block, 0),
        "cayley": (lambda: exact.cayley_backward(q, grad), 3 * block, 2),
        "cayley_neumann": (lambda: neumann.cayley_neumann_backward(q, grad, 4), 3 * block, chains[1]),
        "cayley_neumann_generators": (
            lambda: neumann.cayley_neumann_generators_backward(generators, grad, 4),
            2 * half + block,
            chains[1],
        ),
        "exponential": (
            lambda: exponential.exponential_backward(q, grad),
            3 * block,
            exponential.backward_chain().products(),
        ),
    }
    passes = {"forward": forward[name], "backward": backward[name]}
    return {key: Pass(run, 4 * moved, count * product, "tf32x3") for key, (run, moved, count) in passes.items()}


def folding(width: int, size: int, device: torch.device) -> dict[str, Pass]:
    """Return both passes of a fold of a square weight in bf16, permutations included."""
    from orthotrain.kernels.fold import triton

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16, device=device)

    weight, grad = draw(width, width), draw(width, width)
    d_out, d_in = draw(width // size, size, size), draw(width // size, size, size)
    rows, columns = (torch.randperm(width // GROUPS[0], device=device) for _ in range(2))
    least, flops = 4 * width * width, 2 * width * width * 2 * size
    return {
        "forward": Pass(lambda: triton.fold_forward(weight, d_out, d_in, rows, columns), least, flops),
        "backward": Pass(lambda: triton.fold_backward(grad, weight, d_out, d_in, rows, columns), least, 2 * flops),
    }


def unpacking(width: int, device: torch.device) -> dict[str, dict[str, Pass]]:
    """Return the passes of both quantised formats of a square weight, to bf16."""
    from orthotrain.kernels.dequant import triton

    codes = torch.randint(-127, 128, (width, width), dtype=torch.int8, device=device)
    scales, packed = torch.rand(width, width // 256, device=device), codes[:, ::2].to(torch.uint8)
    groups = width * width // 64
    absmax = torch.randint(0, 256, (groups,), dtype=torch.uint8, device=device)
    statistics = (absmax, *(torch.rand(count, device=device) for count in (-(-groups // 256), 1, 256)))
    int8_bytes, nf4_bytes = codes.numel() + 4 * scales.numel(), packed.numel() + groups + 4 * groups // 256
    unpacked = 2 * width * width
    return {
        "int8": {
            "forward": Pass(lambda: triton.dequant_int8_forward(codes, scales, torch.bfloat16), int8_bytes + unpacked)
        },
        "nf4": {
            "forward": Pass(
                lambda: triton.dequant_nf4_forward(packed, *statistics, 64, torch.bfloat16), nf4_bytes + unpacked
            )
        },
    }


def rotation(tokens: int, width: int, size: int, group: int | None, device: torch.device) -> dict[str, Pass]:
    """Return both passes of a rotation in bf16, without autograd; permuted by groups, or not for None."""
    from orthotrain.kernels.block_rotate import triton

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16, device=device)

    x, grad, displacement = draw(tokens, width), draw(tokens, width), draw(width // size, size, size)
    order = None if group is None else torch.randperm(width // group, device=device)
    elements, flops, blocks = 2 * tokens * width, 2 * tokens * width * size, 2 * width * size
    return {
        "forward": Pass(
            lambda: triton.block_rotate_forward(x, displacement, order, None), 2 * elements + blocks, flops
        ),
        "backward": Pass(
            lambda: triton.block_rotate_backward(grad, x, displacement, order, None),
            3 * elements + 2 * blocks,
            2 * flops,
        ),
    }
