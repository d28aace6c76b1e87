"""Blocks taken in parts give the same numbers; inverting by transposing is as good as its bound."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthotrain.kernels import block_batches
from orthotrain.kernels.block_batches import (
    gram_deviation,
    in_parts,
    inverse_transpose_times,
    inverts_by_transposing,
    largest_norm,
    times_inverse_transpose,
)
from orthotrain.kernels.cayley import cayley
from orthotrain.kernels.cayley import cpu as cayley_cpu
from orthotrain.kernels.cayley_neumann import cpu as neumann
from orthotrain.kernels.exponential import cpu as exponential
from orthotrain.kernels.skew.cpu import skew_forward


@pytest.fixture
def scaled():
    """Rotations (50, 16, 16) that are longer than orthogonal ones by just less than fp32 bears."""
    raw = 0.2 * torch.randn(50, 16, 16, dtype=torch.float64)
    bound = torch.finfo(torch.float32).eps ** 0.5
    return (1 + bound / 16**0.5 / 2 * 0.99) * (torch.eye(16) + cayley(raw - raw.mT))


def test_the_inverse_is_that_good_at_its_bound_for_every_block(scaled):
    displacement = scaled - torch.eye(16)
    deviation = gram_deviation(displacement)
    norm, bound = largest_norm(deviation), torch.finfo(torch.float32).eps ** 0.5
    assert bound * 0.98 < norm < bound < float(deviation.norm())
    assert [inverts_by_transposing(norm, t) for t in (torch.float32, torch.float64)] == [True, False]
    matrix, inverse = torch.randn(50, 16, 16, dtype=torch.float64), torch.linalg.inv(scaled).mT
    for got, want in (
        (inverse_transpose_times(matrix, displacement, deviation), inverse @ matrix),
        (times_inverse_transpose(matrix, displacement, deviation), matrix @ inverse),
    ):
        assert 0 < float((got - want).norm() / want.norm()) < torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_deviation_of_16_bits_is_that_of_what_is_stored(dtype, scaled):
    displacement = (scaled - torch.eye(16)).to(dtype)
    rotation = displacement.double() + torch.eye(16)
    deviation = gram_deviation(displacement)
    assert deviation.dtype == torch.float32
    torch.testing.assert_close(deviation.double(), rotation.mT @ rotation - torch.eye(16), rtol=0, atol=1e-6)
    matrix = torch.randn(50, 16, 16).to(dtype)
    got, want = (
        times_inverse_transpose(matrix, displacement, deviation),
        matrix.double() @ torch.linalg.inv(rotation).mT,
    )
    assert got.dtype == dtype and float((got - want).norm() / want.norm()) < torch.finfo(dtype).eps


def test_no_blocks_deviate_by_nothing():
    assert largest_norm(gram_deviation(torch.zeros(0, 4, 4))) == 0


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 20), st.integers(1, 9), st.integers(1, 6))
def test_every_block_is_computed_once_from_its_own_operands(count, block_size, blocks_in_a_part):
    left, right = torch.randn(count, block_size, block_size), torch.randn(count, 3)
    sizes = []

    def function(left, right):
        sizes.append(left.shape[0])
        return left.sum((1, 2)) + right.prod(1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_batches, "PART_BYTES", blocks_in_a_part * block_size**2 * 4)
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
        monkeypatch.setattr(block_batches, "PART_BYTES", size)
        displacement = cayley_cpu.cayley_forward(q)
        computed.append(
            [
                displacement,
                cayley_cpu.cayley_backward(grad, displacement),
                exponential.exponential_forward(q),
                exponential.exponential_backward(grad, q),
                *(neumann.cayley_neumann_forward(generators, 8, order, dtype) for order in (1, 3, 4)),
                *(neumann.cayley_neumann_backward(grad, generators, order) for order in (1, 3, 4)),
            ]
        )
    for whole, taken_apart in zip(*computed, strict=True):
        assert whole.dtype == dtype
        torch.testing.assert_close(whole, taken_apart, rtol=1e-6, atol=1e-7)
