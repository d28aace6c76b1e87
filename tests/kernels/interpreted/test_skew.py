"""skew and its gradient by the Triton kernels: equal to the reference to the last bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthotrain.kernels.skew import cpu, skew

DTYPES = st.sampled_from([torch.float32, torch.float16])


@given(blocks=st.integers(0, 9), block_size=st.integers(1, 40), dtype=DTYPES, expanded=st.booleans())
@settings(max_examples=40, deadline=None)
def test_equals_the_reference(blocks, block_size, dtype, expanded):
    check(blocks, block_size, dtype, expanded)


@pytest.mark.parametrize("block_size", [64, 65, 130])
def test_several_tiles(block_size):
    check(2, block_size, torch.float32, expanded=False)


def check(blocks, block_size, dtype, expanded):
    generators = torch.randn(block_size * (block_size - 1) // 2, blocks).to(dtype).T.requires_grad_()
    q = skew(generators, block_size)
    assert torch.equal(q, cpu.skew_forward(generators.detach(), block_size))
    assert q.dtype == dtype and not torch.signbit(q.diagonal(dim1=1, dim2=2)).any()
    grad = torch.randn(block_size, block_size).to(dtype).expand_as(q) if expanded else torch.randn_like(q)
    (found,) = torch.autograd.grad(q, generators, grad)
    assert torch.equal(found, cpu.skew_backward(grad))
