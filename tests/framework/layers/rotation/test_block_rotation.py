"""BlockRotation: block-stochastic, fully stochastic, and what it refuses."""

import pytest
import torch

from orthotrain.errors import ConfigurationError
from orthotrain.layers import BlockRotation
from orthotrain.plugins import Cayley


@pytest.mark.parametrize(("features", "size", "blocks"), [(24, 8, None), (27, 8, None), (27, 12, 1), (9, 9, 1)])
def test_is_a_rotation_of_the_permuted_coordinates(features, size, blocks, randomize):
    order = torch.randperm(features)
    rotation = randomize(BlockRotation(features, size, Cayley(), blocks, order).double(), 0.3)
    matrix = rotation(torch.eye(features, dtype=torch.float64))
    torch.testing.assert_close(matrix.T @ matrix, torch.eye(features, dtype=torch.float64), rtol=0, atol=1e-12)
    untouched = order[rotation.blocks * size :]
    assert torch.equal(matrix[untouched], torch.eye(features, dtype=torch.float64)[untouched])
    moved = (matrix - torch.eye(features, dtype=torch.float64)).abs().sum(1)
    assert (moved[order[: rotation.blocks * size]] > 0).all()


def test_zero_generators_are_the_identity_bit_for_bit():
    x = torch.randn(5, 24)
    assert torch.equal(BlockRotation(24, 8, permutation=torch.randperm(24))(x), x)


def test_reset_takes_the_next_permutation(randomize):
    rotation = randomize(BlockRotation(24, 8, permutation=torch.randperm(24)))
    order = torch.randperm(24)
    rotation.reset_(order)
    assert not rotation.generators.any() and torch.equal(rotation.permutation, order)


@pytest.mark.parametrize("blocks", [0, 4, -1])
def test_a_number_of_blocks_that_does_not_fit_is_refused(blocks):
    with pytest.raises(ConfigurationError, match=f"blocks={blocks}: a width of 24 takes 1 to 3 blocks of 8"):
        BlockRotation(24, 8, blocks=blocks)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (torch.arange(23), r"permutation is torch.int64 \(23,\); a permutation here is int64 \(24,\)"),
        (torch.arange(24, dtype=torch.int32), r"permutation is torch.int32 \(24,\)"),
        (torch.zeros(24, dtype=torch.int64), "permutation is no permutation: it repeats or leaves out coordinates"),
    ],
)
def test_what_is_no_permutation_is_refused(order, message, monkeypatch):
    monkeypatch.setenv("ORTHOTRAIN_DEBUG", "1")
    with pytest.raises(ConfigurationError, match=f"BlockRotation: {message}"):
        BlockRotation(24, 8, permutation=order)


def test_a_state_without_the_permutation_misses_a_key_and_a_description_tells_of_it():
    permuted = BlockRotation(24, 8, permutation=torch.randperm(24))
    with pytest.raises(RuntimeError, match=r"Missing key.*permutation"):
        permuted.load_state_dict({"generators": permuted.generators})
    assert "permuted" in repr(permuted) and "natural order" in repr(BlockRotation(24, 8))
