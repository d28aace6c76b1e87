"""Samplers: the batches of each rank in a deterministic order, for training and for evaluation."""

import hashlib
from collections.abc import Iterator
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch
from torch.utils.data import DistributedSampler

from orthotrain.errors import ConfigurationError

_GOLDEN_RATIO = (5**0.5 - 1) / 2


class TrainSampler(DistributedSampler):
    """Batches of indices from a permutation that seed and epoch determine.

    Rank r of R takes the positions r, r+R, r+2R, ... of the permutation: two ranks, and one rank that accumulates two
    batches, see the same samples in each optimizer step. An epoch leaves out the last samples if they do not fill a
    batch on every rank, so that shapes are static. Lightning does not replace a `DistributedSampler`.

    Args:
        samples: Number of samples.
        batch_size: Samples of one batch on one rank.
        rank: This rank.
        world_size: R, the number of ranks.
        seed: Seed of the permutation.
    """

    _purpose: ClassVar[str] = "order"

    def __init__(self, samples: int, batch_size: int, rank: int, world_size: int, seed: int) -> None:
        super().__init__(range(samples), num_replicas=world_size, rank=rank, seed=seed)  # type: ignore[arg-type]
        self.samples = samples
        self.batches = samples // (batch_size * world_size)
        self.batch_size = batch_size
        self.first_batch = 0
        """Where the next iteration starts; the length stays the length of the whole epoch."""

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:  # type: ignore[override]
        digest = hashlib.sha256(f"{self._purpose} {self.seed} {self.epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        permutation = torch.randperm(self.samples, generator=generator)
        used = permutation[: self.batches * self.num_replicas * self.batch_size]
        return iter(self._cut(used, generator)[self.rank :: self.num_replicas][self.first_batch :].tolist())

    def _cut(self, samples: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Return the batches of all ranks, shape ``(batches * R, batch_size)``; batch i is a batch of rank i mod R."""
        rounds = samples.view(self.batches, self.batch_size, self.num_replicas)
        return rounds.transpose(1, 2).reshape(-1, self.batch_size)


class LengthGroupedSampler(TrainSampler):
    """Batches of samples of similar length, in an order that seed and epoch determine.

    The permutation of an epoch is cut into pools of 64 batches. Each pool is sorted by length and cut into batches, and
    the batches of all pools are shuffled. Rank r of R takes the batches r, r+R, r+2R, ... As in `TrainSampler`, R ranks
    and one rank that accumulates R batches see the same samples in each optimizer step.

    Args:
        lengths: Length of each sample.
        batch_size: Samples of one batch on one rank.
        rank: This rank.
        world_size: R, the number of ranks.
        seed: Seed of the permutation.
    """

    POOL_BATCHES: ClassVar[int] = 64
    """Batches in a pool: larger pools need less padding, smaller pools shuffle better."""
    _purpose = "lengths"

    def __init__(self, lengths: np.ndarray, batch_size: int, rank: int, world_size: int, seed: int) -> None:
        super().__init__(len(lengths), batch_size, rank, world_size, seed)
        self.lengths = torch.from_numpy(lengths)

    def _cut(self, samples: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        pools = samples.split(self.POOL_BATCHES * self.batch_size)
        batches = torch.cat([pool[self.lengths[pool].argsort(stable=True)] for pool in pools]).view(-1, self.batch_size)
        return batches[torch.randperm(len(batches), generator=generator)]


def spread_order(count: int, seed: int) -> np.ndarray:
    """Return a permutation of ``range(count)`` whose every beginning is spread evenly over the whole range.

    The places are the multiples of the golden ratio modulo 1 (a sequence of low discrepancy), from a start that the
    seed decides. The first n places are spread more evenly than n random ones.
    """
    digest = hashlib.sha256(f"evaluation {seed}".encode()).digest()
    start = int.from_bytes(digest[:8], "little") / 2**64
    return ((start + np.arange(count) * _GOLDEN_RATIO) % 1.0).argsort().argsort()


class EvalSampler(DistributedSampler):
    """Batches of indices of one rank: every sample once, and the same number of batches on each rank.

    A batch holds neighbors, which a dataset may sort by length. The batches come in `spread_order`: an evaluation that
    stops early (``limit_val_batches``) reads a fair sample. The order is the same in each epoch and each resumed run.

    PyTorch's own sampler repeats samples until all ranks have the same number, which biases a metric. Unequal numbers
    of batches would block collectives. Here the last round shares the remaining samples evenly. A batch of the last
    round holds up to one sample more than ``batch_size`` if a rank would have none otherwise.

    Args:
        samples: Number of samples.
        batch_size: Samples of one batch on one rank.
        rank: This rank.
        world_size: Number of ranks.
        seed: Seed of the order of the batches.

    Raises:
        ConfigurationError: There are fewer samples than ranks.
    """

    def __init__(self, samples: int, batch_size: int, rank: int, world_size: int, seed: int = 0) -> None:
        super().__init__(range(samples), num_replicas=world_size, rank=rank, shuffle=False)  # type: ignore[arg-type]
        if samples < world_size:
            raise ConfigurationError(f"{samples} samples cannot be shared by {world_size} ranks; use fewer devices")
        full, rest = divmod(samples, batch_size * world_size)
        if full and rest < world_size:
            full, rest = full - 1, rest + batch_size * world_size
        edges = [number * batch_size for number in range(full * world_size)]
        edges += [samples - rest + rest * number // world_size for number in range(world_size + 1)]
        batches = [list(range(start, end)) for start, end in pairwise(edges)]
        self.batches = [batches[number] for number in spread_order(len(batches), seed)[rank::world_size]]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:  # type: ignore[override]
        return iter(self.batches)
