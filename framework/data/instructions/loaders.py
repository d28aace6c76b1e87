"""Loaders of instruction data: the same order whether rows are padded or packed, on one rank or many."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from orthotrain.data.evaluation import EvalBatches
from orthotrain.data.instructions.packing import PackedRows
from orthotrain.data.instructions.padding import LengthGroupedSampler, PaddedRows
from orthotrain.data.sampling import ResumableLoader, TrainSampler


@dataclass(frozen=True)
class Loading:
    """How a split is read.

    Attributes:
        batch_size: Sequences of one batch on one rank.
        rank: This rank.
        world_size: Number of ranks.
        num_workers: Processes that prepare batches.
        seed: Seed of the order.
        overfits: Whether Lightning is going to replace samplers by sequential ones.
    """

    batch_size: int
    rank: int = 0
    world_size: int = 1
    num_workers: int = 0
    seed: int = 0
    overfits: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """What every loader is given."""
        workers = self.num_workers
        return {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": torch.cuda.is_available()}


def train_loader(dataset: PackedRows | PaddedRows, loading: Loading) -> ResumableLoader:
    """Batches in the order of (seed, epoch), the same number on each rank."""
    size, place = loading.batch_size, (loading.rank, loading.world_size, loading.seed)
    if isinstance(dataset, PackedRows):
        sampler: TrainSampler = TrainSampler(len(dataset), size, *place)
        return ResumableLoader(dataset, sampler=sampler, batch_size=size, drop_last=True, **loading.options)
    if loading.overfits:
        return ResumableLoader(dataset, batch_size=size, collate_fn=_as_it_is, **loading.options)
    sampler = LengthGroupedSampler(dataset.lengths, size, *place)
    return ResumableLoader(dataset, sampler=sampler, batch_size=None, **loading.options)


def eval_loader(dataset: PackedRows | PaddedRows, loading: Loading) -> DataLoader:
    """Every row once, in the dataset's order, the same number of batches on each rank."""
    if loading.overfits:
        collate = _as_it_is if isinstance(dataset, PaddedRows) else None
        return DataLoader(dataset, batch_size=loading.batch_size, collate_fn=collate, **loading.options)
    batches = EvalBatches(len(dataset), loading.batch_size, loading.rank, loading.world_size)
    return DataLoader(dataset, sampler=batches, batch_size=None, **loading.options)


def _as_it_is(batch: Any) -> Any:
    """What the dataset made is a batch already; a named function, so that workers can be spawned."""
    return batch
