"""The check that comes before the clock: every operation by its Triton kernels against its reference in fp64."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from orthotrain.kernels.backend import use_backend
from orthotrain.kernels.block_rotate import block_rotate
from orthotrain.kernels.cayley import cayley
from orthotrain.kernels.cayley_neumann import cayley_neumann, cayley_neumann_generators
from orthotrain.kernels.dequant import dequant_int8, dequant_nf4
from orthotrain.kernels.exponential import exponential
from orthotrain.kernels.fold import fold
from orthotrain.kernels.groups import GROUPS
from orthotrain.kernels.oft_linear import oft_linear
from orthotrain.kernels.skew import skew

Results = Callable[[torch.dtype], dict[str, Tensor]]
"""The results of an operation by name, of operands that were rounded and are then taken in a dtype."""

LIMITS = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 2e-6}
"""Relative error (Frobenius) that rounding explains: 2 to 4 roundings of a sum."""

CHAIN_LIMITS = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 1e-5}
"""Likewise of the parameterizations, down to their generators: differences of rounded entries, products in tf32x3."""

SHAPES = [(304, 1000, 4), (1000, 712, 32), (513, 640, 64), (257, 1000, 100), (300, 1100, 256), (264, 2104, 1024)]
"""(N, d, b); in most of them the blocks leave a rest."""

BLOCKS = [(2000, 16), (300, 64), (20, 200), (10, 256)]
"""(n, b) of parameterizations: several in a tile, one of them, tiles cut off, whole tiles."""

PARAMETERIZATIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "skew": skew,
    "cayley": lambda g, b: cayley(skew(g, b)),
    "cayley_neumann": lambda g, b: cayley_neumann(skew(g, b), 4),
    "cayley_neumann order 3": lambda g, b: cayley_neumann(skew(g, b), 3),
    "cayley_neumann_generators": lambda g, b: cayley_neumann_generators(g, b, 4),
    "exponential": lambda g, b: exponential(skew(g, b)),
}
WIDEST_CAYLEY = 64


def checks(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, float, Results]]:
    """Yield what is to be checked in a dtype: name of the case, largest error, results."""
    for rows, width, size in SHAPES:
        for group in (None, 1, *(group for group in GROUPS[:1] if rows % group == width % group == 0)):
            case = f"{rows}x{width} b={size}{'' if group is None else f' permuted by {group}'}"
            yield f"rotation {case}", LIMITS[dtype], rotation((rows, width, size), dtype, group, device)
    for blocks, size in BLOCKS:
        for name, op in PARAMETERIZATIONS.items():
            if name != "cayley" or size <= WIDEST_CAYLEY:
                results = parameterization(op, blocks, size, dtype, device)
                yield f"{name} n={blocks} b={size}", CHAIN_LIMITS[dtype], results
    yield "unpacking", LIMITS[dtype], unpacking(dtype, device)


def errors(results: Results, dtype: torch.dtype, choice: str = "triton") -> dict[str, float]:
    """Return the error of every result, relative to its norm; a repeated run must give the same bits.

    Args:
        results: Of an operation.
        dtype: What to compute in.
        choice: Of the kernels that are checked.
    """
    with use_backend(choice):
        found, again = results(dtype), results(dtype)
    with use_backend("reference"):
        exact = results(torch.float64)
    repeats = all(torch.equal(found[name], again[name]) for name in found)
    return {name: relative(found[name], exact[name]) if repeats else float("inf") for name in found}


def relative(found: Tensor, exact: Tensor) -> float:
    """Return ``||found - exact|| / ||exact||``; infinite where anything is not a number."""
    found, exact = found.detach().double(), exact.detach()
    value = float((found - exact).norm() / exact.norm().clamp_min(1e-30))
    return value if value == value else float("inf")


def rotation(shape: tuple[int, int, int], dtype: torch.dtype, group: int | None, device: torch.device) -> Results:
    """Return the results of block_rotate, fold and oft_linear with their gradients, permuted by groups or not."""
    rows, width, size = shape
    generator = torch.Generator(device).manual_seed(rows)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    x, grad, weight = draw(rows, width), draw(rows, width), draw(48, width)
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
            ("oft ", z, {"dx": x_, "dD": d_in_}, grad[:, :48]),
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


def unpacking(dtype: torch.dtype, device: torch.device) -> Results:
    """Return unpacked weights, int8 and NF4 with and without double quantisation."""
    generator = torch.Generator(device).manual_seed(0)

    def whole(low: int, high: int, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, device=device, dtype=dtype)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    codes, scales, packed = (
        whole(-127, 128, 300, 512, dtype=torch.int8),
        draw(300, 2),
        whole(0, 256, 300, 256, dtype=torch.uint8),
    )
    groups = 300 * 512 // 64
    plain = (draw(groups), None, None, None)
    double = (whole(0, 256, groups, dtype=torch.uint8), draw(-(-groups // 256)), draw(1), draw(256))

    def results(kind: torch.dtype) -> dict[str, Tensor]:
        found = {"int8": dequant_int8(codes, scales, kind)}
        for name, statistics in (("nf4", plain), ("nf4 double", double)):
            found[name] = dequant_nf4(packed, *statistics, group_size=64, dtype=kind)
        return found

    return results
