"""Gradients at the identity by the Triton kernels: equal to the fp64 reference within the rounding of its sums."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthotrain.kernels.dispatch import implementation
from orthotrain.kernels.tangent import reference, tangent, tangent_linear

TOLERANCE = {torch.float32: 2.0**-20, torch.float16: 2.0**-20}
"""Of the norm of what is contracted: products of 16-bit values are exact in fp32, and so are kept the sums."""


def check(kind, blocks, size, rest, other, dtype, permuted, seed=0):
    width = blocks * size + rest
    generator = torch.Generator().manual_seed(seed)
    shape = (width, other) if kind == "row" else (other, width)
    left, right = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    permutation = torch.randperm(width, generator=generator) if permuted else None
    triton = implementation(left, "tangent")
    assert triton.__name__.endswith("tangent.triton")
    got = getattr(triton, f"{kind}_gradient")(left, right, permutation, blocks, size)
    want = getattr(reference, f"{kind}_gradient")(left.double(), right.double(), permutation, blocks, size)
    assert got.dtype == torch.float32 and got.shape == want.shape and not got.isnan().any()
    scale = left.double().norm() * right.double().norm()
    assert (got.double() - want).norm() <= TOLERANCE[dtype] * scale


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(["activation", "row", "column"]),
    st.integers(1, 3), st.integers(2, 12), st.integers(0, 20), st.integers(1, 40),
    st.sampled_from(list(TOLERANCE)), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_any_shape(kind, blocks, size, rest, other, dtype, permuted, seed):
    check(kind, blocks, size, rest, other, dtype, permuted, seed)


@pytest.mark.parametrize("kind", ["activation", "row", "column"])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_blocks_in_parts_and_rows_in_splits(kind, dtype):
    check(kind, 1, 130, 3, 600, dtype, permuted=True)


def test_both_ways_of_a_layer():
    x, weight = torch.randn(6, 12, requires_grad=True), torch.randn(10, 12)
    out, into = torch.zeros(2, 10, requires_grad=True), torch.zeros(3, 6, requires_grad=True)
    permutations = torch.randperm(10), torch.randperm(12)
    through = tangent_linear(x, weight, out, into, *permutations, (5, 4))
    tapped = tangent(tangent(x, into, permutations[1], 4) @ weight.T, out, permutations[0], 5)
    found = [torch.autograd.grad(y.square().sum(), (x, out, into)) for y in (through, tapped)]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_full_graph():
    x, into, permutation = (
        torch.randn(6, 12, requires_grad=True),
        torch.zeros(3, 6, requires_grad=True),
        torch.randperm(12),
    )
    compiled = torch.compile(tangent, fullgraph=True, backend="aot_eager")
    found, expected = (
        torch.autograd.grad(f(x, into, permutation, 4).square().sum(), into) for f in (compiled, tangent)
    )
    assert torch.equal(found[0], expected[0])
