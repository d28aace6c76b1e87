"""How many features and pairs of features the blocks of a side have covered since the start of a run."""

import torch

from orthotrain.kernels.permutations import by_feature
from orthotrain.layers.poet.poet_settings import Side
from orthotrain.layers.protocols import SideCoverage
from orthotrain.layers.rotation.block_rotation import BlockRotation
from orthotrain.seeding import draw_permutation, generator


def side_coverage(rotation: BlockRotation, side: Side, seed: int, merges: int, sample: int) -> SideCoverage:
    """Return the coverage of one side, from the permutations of all periods, which are drawn again.

    Args:
        rotation: The rotation of the side.
        side: Which side it is.
        seed: Seed of the layer's permutations.
        merges: Merges so far.
        sample: Number of random pairs of features from which the covered share of all pairs is estimated.
    """
    width, size, covered = rotation.features, rotation.block_size, rotation.blocks * rotation.block_size
    first = torch.randint(0, width, (sample,), generator=generator(seed, side, "pairs"))
    offset = torch.randint(1, width, (sample,), generator=generator(seed, side, "offsets"))
    second = (first + offset) % width
    periods = torch.zeros(width, dtype=torch.int64)
    met = torch.zeros(sample, dtype=torch.bool)
    for count in range(merges + 1):
        position = torch.arange(width)
        if rotation.permutation is not None:
            permutation = draw_permutation(rotation.permutation.shape[0], seed, count, side)
            position = torch.argsort(by_feature(permutation, width))
        inside, block = position < covered, position // size
        periods += inside
        met |= inside[first] & inside[second] & (block[first] == block[second])
    return SideCoverage(periods, float(met.float().mean()))
