"""Blocks taken a few at a time: the same numbers, whatever the number of blocks, and nowhere but on the CPU."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthotrain.kernels import parts
from orthotrain.kernels.cayley import reference as cayley
from orthotrain.kernels.cayley_neumann import reference as neumann
from orthotrain.kernels.exponential import reference as exponential
from orthotrain.kernels.parts import in_parts
from orthotrain.kernels.skew.reference import skew_forward


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 20), st.integers(1, 9), st.integers(1, 6))
def test_every_block_is_computed_once_from_its_own_operands(count, block_size, blocks_in_a_part):
    left, right = torch.randn(count, block_size, block_size), torch.randn(count, 3)
    sizes = []

    def function(left, right):
        sizes.append(left.shape[0])
        return left.sum((1, 2)) + right.prod(1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "PART_BYTES", blocks_in_a_part * block_size**2 * 4)
        result = in_parts(function, left, right, block_size=block_size)
    assert torch.equal(result, left.sum((1, 2)) + right.prod(1))
    assert sum(sizes) == count and max(sizes) <= blocks_in_a_part


def test_other_devices_take_all_blocks_at_once():
    sizes = []
    in_parts(lambda t: sizes.append(t.shape[0]) or t, torch.zeros(10**6, 4, 4, device="meta"), block_size=4)
    assert sizes == [10**6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_parameterizations_do_not_depend_on_the_parts(dtype, monkeypatch):
    generators = 0.05 * torch.randn(13, 28, dtype=torch.float64).to(dtype)
    q, grad = skew_forward(generators, 8), torch.randn(13, 8, 8, dtype=torch.float64).to(dtype)
    computed = []
    for size in (2**18, 2**10):
        monkeypatch.setattr(parts, "PART_BYTES", size)
        displacement = cayley.cayley_forward(q)
        computed.append(
            [
                displacement,
                cayley.cayley_backward(displacement, grad),
                exponential.exponential_forward(q),
                exponential.exponential_backward(q, grad),
                *(neumann.cayley_neumann_forward(q, order) for order in (1, 3, 4)),
                *(neumann.cayley_neumann_backward(q, grad, order) for order in (1, 3, 4)),
                neumann.cayley_neumann_generators_forward(generators, 8, 4, dtype),
                neumann.cayley_neumann_generators_backward(generators, grad, 4),
            ]
        )
    for whole, taken_apart in zip(*computed, strict=True):
        assert whole.dtype == dtype
        torch.testing.assert_close(whole, taken_apart, rtol=1e-6, atol=1e-7)
