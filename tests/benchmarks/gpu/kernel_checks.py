"""Every operation by its Triton kernels (wide blocks of Cayley: by PyTorch) against its reference in fp64."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu.device import Gpu
from gpu.record import Case
from orthotrain.kernels.block_rotate import block_rotate
from orthotrain.kernels.cayley import cayley
from orthotrain.kernels.cayley_neumann import cayley_neumann
from orthotrain.kernels.chain.program import FUSED
from orthotrain.kernels.dequant import dequant_int8, dequant_nf4
from orthotrain.kernels.dispatch import use_backend
from orthotrain.kernels.exponential import exponential
from orthotrain.kernels.fold import fold
from orthotrain.kernels.oft_linear import oft_linear
from orthotrain.kernels.permutations import GROUPS
from orthotrain.kernels.skew import skew

Results = Callable[[torch.dtype], dict[str, Tensor]]
"""The results of an operation by name, of operands that were rounded and are then taken in a dtype."""

LIMITS = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 2e-6}
"""Relative error (Frobenius) that rounding explains: 2 to 4 roundings of a sum."""

CHAIN_LIMITS = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 1e-5}
"""Likewise of the parameterizations, down to their generators: differences of rounded entries, products in tf32x3."""

SHAPES = {
    (304, 1000, 4): (24, 40, 4),
    (1000, 712, 32): (40, 72, 32),
    (513, 640, 64): (17, 128, 64),
    (257, 1000, 100): (9, 104, 50),
    (300, 1100, 256): (20, 70, 32),
    (264, 2104, 1024): (24, 72, 32),
}
"""(N, d, b), in most of them the blocks leave a rest; and the smaller ones of a rehearsal."""

BLOCKS = {(2000, 16): (4, 16), (300, 64): (2, 32), (20, 200): (2, 20), (10, 256): (1, 32)}
"""(n, b) of parameterizations: several in a tile, one of them, tiles cut off, whole tiles."""

PARAMETERIZATIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "skew": skew,
    "cayley": lambda g, b: cayley(skew(g, b)),
    "cayley_neumann": lambda g, b: cayley_neumann(g, b, 4),
    "cayley_neumann order 3": lambda g, b: cayley_neumann(g, b, 3),
    "exponential": lambda g, b: exponential(skew(g, b)),
}
WRONG = 9e99
"""The error of a result that is not finite or not repeated: JSON has no infinity."""


def cases(machine: Gpu, dtype: torch.dtype) -> Iterator[Case]:
    """Yield the checks of every operation in a dtype."""

    def check(name: str, limit: float, make: Callable[[], Results], choice: str = "triton") -> Case:
        kind = str(dtype).removeprefix("torch.")
        return Case(f"{name} {kind}", lambda: judged(machine, make(), dtype, limit, choice))

    for shape, small in SHAPES.items():
        rows, width, size = shape
        for group in (None, 1, *(group for group in GROUPS[:1] if rows % group == width % group == 0)):
            name = f"rotation {rows}x{width} b={size}{'' if group is None else f' permuted by {group}'}"
            chosen = machine.pick(shape, small)
            yield check(name, LIMITS[dtype], partial(rotation, chosen, dtype, group, machine.device))
    for shape, small in BLOCKS.items():
        for name, op in PARAMETERIZATIONS.items():
            choice = "auto" if name == "cayley" and shape[1] > FUSED else "triton"  # PyTorch solves for wide blocks
            make = partial(parameterization, op, *machine.pick(shape, small), dtype, machine.device)
            yield check(f"{name} n={shape[0]} b={shape[1]}", CHAIN_LIMITS[dtype], make, choice)
    yield check("unpacking", LIMITS[dtype], partial(unpacking, machine.pick(300, 8), dtype, machine.device))


def judged(machine: Gpu, results: Results, dtype: torch.dtype, limit: float, choice: str = "triton") -> dict[str, Any]:
    """Return the errors of an operation, and whether all are within the limit.

    Args:
        machine: What computes; a rehearsal holds the reference to itself.
        results: Of the operation.
        dtype: What to compute in.
        limit: The largest error, relative.
        choice: Which implementation is checked.
    """
    found = errors(results, dtype, machine.pick(choice, "reference"))
    return {"errors": found, "limit": limit, "right": all(error <= limit for error in found.values())}


def errors(results: Results, dtype: torch.dtype, choice: str) -> dict[str, float]:
    """Return the relative error of every result, or 9e99 if a second run gives other bits."""
    with use_backend(choice):
        found, again = results(dtype), results(dtype)
    with use_backend("reference"):
        exact = results(torch.float64)
    repeats = all(torch.equal(found[name], again[name]) for name in found)
    return {name: relative(found[name], exact[name]) if repeats else WRONG for name in found}


def relative(found: Tensor, exact: Tensor) -> float:
    """Return ``||found - exact|| / ||exact||``; 9e99 where anything is not a number."""
    found, exact = found.detach().double(), exact.detach()
    value = float((found - exact).norm() / exact.norm().clamp_min(1e-30))
    return value if math.isfinite(value) else WRONG


def rotation(shape: tuple[int, int, int], dtype: torch.dtype, group: int | None, device: torch.device) -> Results:
    """Return the results of block_rotate, fold and oft_linear with their gradients, permuted by groups or not."""
    rows, width, size = shape
    out = min(48, width)
    generator = torch.Generator(device).manual_seed(rows)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    x, grad, weight = draw(rows, width), draw(rows, width), draw(out, width)
    d_in, d_out = draw(width // size, size, size) / size**0.5, draw(rows // size, size, size) / size**0.5
    orders = [
        None if group is None else torch.randperm(k // group, generator=generator, device=device) for k in (rows, width)
    ]

    def results(kind: torch.dtype) -> dict[str, Tensor]:
        x_, d_in_, d_out_ = (t.to(kind).requires_grad_() for t in (x, d_in, d_out))
        y = block_rotate(x_, d_in_, orders[1], orders[1])
        w = fold(x_.detach(), d_out_, d_in_, *orders)
        z = oft_linear(x_, weight.to(kind), d_in_)
        found = {"y": y, "fold": w, "oft": z}
        for name, result, leaves, upper in (
            ("", y, {"dx": x_, "dD": d_in_}, grad),
            ("fold ", w, {"dD_out": d_out_, "dD_in": d_in_}, grad),
            ("oft ", z, {"dx": x_, "dD": d_in_}, grad[:, :out]),
        ):
            gradients = torch.autograd.grad(result, list(leaves.values()), upper.to(kind))
            found |= {name + leaf: gradient for leaf, gradient in zip(leaves, gradients, strict=True)}
        return found

    return results


def parameterization(
    op: Callable[[Tensor, int], Tensor], blocks: int, size: int, dtype: torch.dtype, device: torch.device
) -> Results:
    """Return the displacement of an operation and its gradient for the generators."""
    generator = torch.Generator(device).manual_seed(size)
    drawn = torch.randn(blocks, size * (size - 1) // 2, generator=generator, device=device)
    generators = (drawn * (0.25 / size**0.5)).to(dtype)
    grad = torch.randn(blocks, size, size, generator=generator, device=device).to(dtype)

    def results(kind: torch.dtype) -> dict[str, Tensor]:
        leaf = generators.to(kind).requires_grad_()
        value = op(leaf, size)
        return {"value": value.detach(), "gradient": torch.autograd.grad(value, leaf, grad.to(kind))[0]}

    return results


def unpacking(rows: int, dtype: torch.dtype, device: torch.device) -> Results:
    """Return unpacked weights, int8 and NF4 with and without double quantisation."""
    generator = torch.Generator(device).manual_seed(0)

    def whole(low: int, high: int, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, device=device, dtype=dtype)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    codes, scales, packed = (
        whole(-127, 128, rows, 512, dtype=torch.int8),
        draw(rows, 2),
        whole(0, 256, rows, 256, dtype=torch.uint8),
    )
    groups = rows * 512 // 64
    plain = (draw(groups), [])
    double = (whole(0, 256, groups, dtype=torch.uint8), [draw(-(-groups // 256)), draw(1), draw(256)])

    def results(kind: torch.dtype) -> dict[str, Tensor]:
        found = {"int8": dequant_int8(codes, scales, kind)}
        for name, statistics in (("nf4", plain), ("nf4 double", double)):
            found[name] = dequant_nf4(packed, *statistics, group_size=64, dtype=kind)
        return found

    return results
