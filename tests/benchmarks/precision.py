"""Rounding errors of rotations in 16 bits and of products in TF32, for the pages of kernels. A second on a CPU.

.venv/bin/python tests/benchmarks/precision.py      # writes tests/benchmarks/results/precision.json
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from orthotrain.kernels.block_rotate import block_rotate as rotate
from orthotrain.kernels.cayley_neumann import cayley_neumann
from orthotrain.kernels.skew import skew

Results = dict[str, dict[str, float]]


def generators(blocks: int, size: int, norm: float | None = None) -> Tensor:
    """Return random generators ``(blocks, size(size-1)/2)`` in fp64; with a norm, of that largest ``||Q||_2``."""
    drawn = torch.randn(blocks, size * (size - 1) // 2, dtype=torch.float64)
    largest = torch.linalg.matrix_norm(skew(drawn, size), 2).max()
    return drawn if norm is None else drawn * (norm / largest)


def sixteen_bits() -> Results:
    """Return error and kept share, in bf16, of what a rotation of tokens or of rows of W changes in the output."""
    x, weight = torch.randn(1024, 256).bfloat16(), (torch.randn(256, 256) / 16).bfloat16()
    base, drawn, found = x @ weight.T, generators(8, 32), {}
    for size in (1e-2, 1e-3, 3e-4, 1e-4, 1e-5):
        displacement = cayley_neumann(size * drawn, 32, 4)
        exact = rotate(x.double(), displacement) @ weight.double().T - x.double() @ weight.double().T
        low = displacement.bfloat16()
        outputs = {"tokens": rotate(x, low) @ weight.T, "rows of W": x @ rotate(weight, low.mT.contiguous()).T}
        row = found[f"{size:.0e}"] = {}
        for name, y in outputs.items():
            change = y.double() - base.double()
            row[f"{name}, error"] = float((change - exact).norm() / exact.norm())
            row[f"{name}, kept"] = float((change * exact).sum() / exact.square().sum())
    return found


def rounded_displacement() -> Results:
    """Return relative errors of D in bf16 and of its gradient: powers in fp32, and powers in bf16 (cpu.py)."""
    exact = generators(3, 256, 0.2).requires_grad_()
    gradient = torch.randn(3, 256, 256).bfloat16()
    expected = cayley_neumann(exact, 256, 4)
    (expected_gradient,) = torch.autograd.grad(expected, exact, gradient.double())
    found = {}
    for name, dtype in (("fp32, rounded once", None), ("$H$ in bf16", torch.bfloat16)):
        given = exact.detach().float().requires_grad_()
        made = cayley_neumann(given, 256, 4, dtype).bfloat16()
        (made_gradient,) = torch.autograd.grad(made, given, gradient)
        found[name] = {"$D$": error(made, expected), "gradient": error(made_gradient, expected_gradient)}
    return found


def tf32_products() -> Results:
    """Return relative errors of D of order 4 whose factors are rounded to TF32, whole or as sums of two halves."""
    found = {}
    for norm in (0.05, 0.3, 1.0):
        q = skew(generators(4, 64, norm), 64)
        expected = series(q, torch.matmul)
        single = q.float()
        found[f"{norm}"] = {
            "fp32": error(series(single, torch.matmul), expected),
            "tf32x3": error(series(single, three_products), expected),
            "tf32": error(series(single, lambda a, b: tf32(a) @ tf32(b)), expected),
        }
    return found


def series(q: Tensor, product) -> Tensor:
    """Return the displacement of order 4 of ``Q``, with a product of one's own."""
    square = product(q, q)
    second = 2 * (q + square) + product(square, q)
    return 2 * (q + square) + product(square, second)


def three_products(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a b`` by three products of halves in TF32, accumulated in fp32."""
    return tf32(a) @ tf32(b) + (tf32(a) @ tf32(b - tf32(b)) + tf32(a - tf32(a)) @ tf32(b))


def tf32(values: Tensor) -> Tensor:
    """Return fp32 values rounded to the 10 bits of TF32."""
    return ((values.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def error(found: Tensor, expected: Tensor) -> float:
    """Return the relative error in the Frobenius norm."""
    return float((found.double() - expected).norm().detach() / expected.norm().detach())


def main() -> None:
    """Measure and write."""
    torch.manual_seed(0)
    tables = {
        "16 bits": sixteen_bits(), "rounded displacement": rounded_displacement(), "tf32 products": tf32_products()
    }  # fmt: skip
    out = Path(__file__).resolve().parent / "results/precision.json"
    out.write_text(json.dumps({"torch": torch.__version__, "results": tables}, indent=1) + "\n")
    print(out.read_text())


if __name__ == "__main__":
    main()
