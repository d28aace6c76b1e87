"""Inverting nearly orthogonal blocks by transposing them: as good as its bound says, on both sides."""

import pytest
import torch

from orthotrain.kernels.block_batches import (
    gram_deviation,
    inverse_transpose_times,
    inverts_by_transposing,
    largest,
    times_inverse_transpose,
)
from orthotrain.kernels.cayley import cayley


@pytest.fixture
def scaled():
    """Rotations (50, 16, 16) that are longer than orthogonal ones by just less than fp32 bears."""
    raw = 0.2 * torch.randn(50, 16, 16, dtype=torch.float64)
    bound = torch.finfo(torch.float32).eps ** 0.5
    return (1 + bound / 16**0.5 / 2 * 0.99) * (torch.eye(16) + cayley(raw - raw.mT))


def test_the_inverse_is_that_good_at_its_bound_for_every_block(scaled):
    displacement = scaled - torch.eye(16)
    deviation = gram_deviation(displacement)
    norm, bound = largest(deviation), torch.finfo(torch.float32).eps ** 0.5
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
    assert largest(gram_deviation(torch.zeros(0, 4, 4))) == 0
