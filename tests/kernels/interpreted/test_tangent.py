"""Gradients at the identity by the Triton kernels: equal to the definition in fp64 within the rounding of its sums."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthotrain.kernels.dispatch import implementation
from orthotrain.kernels.tangent import naive, tangent, tangent_linear

TOLERANCE = {torch.float32: 2.0**-20, torch.float16: 2.0**-20}
"""Of the norm of what is contracted: products of 16-bit values are exact in fp32, and so are kept the sums."""


def check(transposed, blocks, size, rest, other, dtype, permuted, seed=0):
    width = blocks * size + rest
    generator = torch.Generator().manual_seed(seed)
    shape = (width, other) if transposed else (other, width)
    left, right = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    left, right = (left.mT, right.mT) if transposed else (left, right)
    permutation = torch.randperm(width, generator=generator) if permuted else None
    triton = implementation(left, "tangent")
    assert triton.__name__.endswith("tangent.triton")
    got = triton.tangent_gradient_forward(left, right, permutation, blocks, size)
    want = naive.tangent_gradient(left.double(), right.double(), permutation, blocks, size)
    assert got.dtype == torch.float32 and got.shape == want.shape and not got.isnan().any()
    scale = left.double().norm() * right.double().norm()
    assert (got.double() - want).norm() <= TOLERANCE[dtype] * scale


@settings(max_examples=30, deadline=None)
@given(
    st.booleans(),
    st.integers(1, 3), st.integers(2, 12), st.integers(0, 20), st.integers(1, 40),
    st.sampled_from(list(TOLERANCE)), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_any_shape(transposed, blocks, size, rest, other, dtype, permuted, seed):
    check(transposed, blocks, size, rest, other, dtype, permuted, seed)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_blocks_in_parts_and_rows_in_splits(transposed, dtype):
    check(transposed, 1, 130, 3, 600, dtype, permuted=True)


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
