"""Loaders: training batches whose position a checkpoint saves, and evaluation batches."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lightning import Trainer
from torch.utils.data import DataLoader, Dataset

from orthotrain.data.data_fingerprint import UNKNOWN, DataFingerprint
from orthotrain.data.sampling import EvalSampler, TrainSampler


class BatchDataset(Dataset, ABC):
    """A dataset that makes a whole batch from a list of indices."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of samples."""

    @abstractmethod
    def __getitem__(self, index: int | list[int]) -> dict[str, torch.Tensor]:
        """Return one sample, or the batch of a list of samples."""

    def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
        """Return a batch, for a loader that forms the lists itself."""
        return self[indices]

    def train_sampler(self, *arguments: int) -> TrainSampler:
        """Return the sampler of training batches, from ``batch_size``, ``rank``, ``world_size`` and ``seed``."""
        return TrainSampler(len(self), *arguments)


@dataclass(frozen=True)
class Loading:
    """How a split is read.

    Attributes:
        batch_size: Samples of one batch on one rank.
        rank: This rank.
        world_size: Number of ranks.
        num_workers: Processes that prepare batches.
        seed: Seed of the order of training samples and of evaluation batches.
        overfits: Whether Lightning will replace the samplers by sequential samplers (``overfit_batches``).
    """

    batch_size: int
    rank: int = 0
    world_size: int = 1
    num_workers: int = 0
    seed: int = 0
    overfits: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of every loader."""
        workers = self.num_workers
        shared = {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": torch.cuda.is_available()}
        return {**shared, "batch_size": self.batch_size if self.overfits else None, "collate_fn": _unchanged}


def _unchanged(batch: Any) -> Any:
    """Return a batch that the dataset has made. Not a lambda, so that a worker process can be spawned with it."""
    return batch


def train_loader(dataset: BatchDataset, loading: Loading) -> "ShuffledLoader":
    """Return the loader of batches in the order of seed and epoch, the same number on each rank."""
    share = (loading.batch_size, loading.rank, loading.world_size, loading.seed)
    sampler = None if loading.overfits else dataset.train_sampler(*share)
    return ShuffledLoader(dataset, sampler=sampler, **loading.options)


def eval_loader(dataset: BatchDataset, loading: Loading) -> DataLoader:
    """Return the loader of every sample once; any first batches are a fair sample (see `EvalSampler`)."""
    share = (loading.batch_size, loading.rank, loading.world_size, loading.seed)
    sampler = None if loading.overfits else EvalSampler(len(dataset), *share)
    return DataLoader(dataset, sampler=sampler, **loading.options)


class ResumableLoader(DataLoader, ABC):
    """A `DataLoader` of training batches whose position Lightning saves in checkpoints and restores from them.

    The saved position is the trainer's own count of processed batches, because a loader with workers runs ahead of
    training.
    """

    trainer: Trainer | None = None
    """The trainer counts the finished batches. Without a trainer, the loader counts the batches it has handed out."""
    fingerprint: DataFingerprint = UNKNOWN
    """Fingerprint of the data. It is saved with the position and compared with the fingerprint in a checkpoint."""

    @property
    def processed(self) -> int | None:
        """Batches of this epoch that training has finished; ``None`` without a trainer."""
        if self.trainer is None:
            return None
        return self.trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]

    @abstractmethod
    def position(self) -> dict[str, int]:
        """Return the position after the last finished batch; the same on every rank."""

    @abstractmethod
    def restore(self, position: dict[str, int]) -> None:
        """Continue from a saved position at the next iteration."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and the fingerprint of the data."""
        return {**self.position(), "data": self.fingerprint.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved position at the next iteration.

        Raises:
            ConfigurationError: The position is damaged, belongs to other data, or lies in an epoch of another order.
        """
        self.fingerprint.compare(state.get("data") if isinstance(state, dict) else state)
        names = self.position().keys() - {"seed"}
        if isinstance(state, dict) and all(type(state.get(name)) is int and state[name] >= 0 for name in names):
            self.restore(state)
        else:
            self.fingerprint.refuse(f"the checkpoint holds no position in training data of this kind ({state!s:.80})")


class ShuffledLoader(ResumableLoader):
    """A resumable loader over a `TrainSampler`.

    Lightning makes the iterator of a resumed run before it tells the sampler the epoch. So iteration starts at the
    request for the first batch, and a restored position counts only if the epoch that begins is the epoch of the
    position.
    """

    _started: tuple[int, int] | None = None
    """Epoch of the iteration that is running, and the batches handed out."""

    _restored: dict[str, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if not isinstance(self.sampler, TrainSampler):  # Lightning's overfit_batches puts a SequentialSampler here
            return super().__iter__()
        return self._iterate(self.sampler)

    def _iterate(self, sampler: TrainSampler) -> Iterator[Any]:
        restored, self._restored = self._restored, None
        sampler.first_batch = restored["batches"] if restored and restored["epoch"] == sampler.epoch else 0
        self._started = (sampler.epoch, sampler.first_batch)
        if sampler.first_batch >= sampler.batches:
            return
        for done, batch in enumerate(super().__iter__(), start=sampler.first_batch + 1):
            self._started = (sampler.epoch, done)
            yield batch

    @property
    def _order(self) -> dict[str, int]:
        """The numbers that the order of an epoch depends on."""
        if not isinstance(self.sampler, TrainSampler):
            return {}
        return {name: int(getattr(self.sampler, name)) for name in ("samples", "batch_size", "num_replicas", "seed")}

    def position(self) -> dict[str, int]:
        """Return epoch and batches, with the numbers that the order of the epoch depends on."""
        if self._started is None:
            position = self._restored or {"epoch": getattr(self.sampler, "epoch", 0), "batches": 0}
        else:
            epoch, handed_out = self._started
            position = {"epoch": epoch, "batches": handed_out if self.processed is None else self.processed}
        return {**position, **self._order}

    def restore(self, position: dict[str, int]) -> None:
        """Continue from a saved position at the next iteration.

        Raises:
            ConfigurationError: The position lies inside an epoch of another order.
        """
        here, batches = self._order, position["batches"]
        differing = [name for name in here if position.get(name) != here[name]]
        if differing and 0 < batches < position["samples"] // max(1, position["batch_size"] * position["num_replicas"]):
            saved = ", ".join(f"{name} {position.get(name)}" for name in differing)
            found = ", ".join(f"{name} {here[name]}" for name in differing)
            self.fingerprint.refuse(
                f"the checkpoint is {batches} batches into epoch {position['epoch']} with {saved}; this run has "
                f"{found}: resume with the same values or from a checkpoint at the end of an epoch"
            )
        self._restored = {"epoch": position["epoch"], "batches": batches}
        self._started = None
