"""Windows of tokens in a deterministic order that any number of ranks share and that resumes mid-epoch."""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from lightning import Trainer
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from orthotrain.data.corpus.token_cache import TokenCache
from orthotrain.data.identity import UNKNOWN, DataIdentity


def as_batch(windows: np.ndarray) -> dict[str, torch.Tensor]:
    """Split windows of T+1 tokens, shape ``(..., T + 1)``, into inputs and the tokens that follow them.

    Returns:
        ``input_ids`` and ``labels``, both int64 of shape ``(..., T)``; ``labels[t]`` follows ``input_ids[t]``.
    """
    tokens = torch.from_numpy(windows.astype(np.int64))
    return {"input_ids": tokens[..., :-1].contiguous(), "labels": tokens[..., 1:].contiguous()}


class TokenWindows(Dataset):
    """A token cache cut into windows; neighbours share one token, so that every token but the first is a label once.

    Args:
        cache: The tokens.
        sequence_length: T, the length of ``input_ids``.
    """

    def __init__(self, cache: TokenCache, sequence_length: int) -> None:
        self.cache = cache
        self.sequence_length = sequence_length

    def __len__(self) -> int:
        return max(0, len(self.cache.tokens) - 1) // self.sequence_length

    def __getitem__(self, index: int | list[int]) -> dict[str, torch.Tensor]:
        """One window, shape ``(T,)``, or a batch of them, shape ``(B, T)``, for a list."""
        starts = np.asarray(index)[..., None] * self.sequence_length
        return as_batch(self.cache.tokens[starts + np.arange(self.sequence_length + 1)])


class TrainSampler(DistributedSampler):
    """Visits windows in a permutation drawn from (seed, epoch), every rank taking each R-th place of it.

    Rank r of R takes the places r, r+R, r+2R, ...: two ranks and one rank that accumulates two batches see the same
    windows in each optimizer step. An epoch drops what does not fill a batch on every rank, so that shapes are static.
    A `DistributedSampler`, so Lightning leaves it in place.

    Args:
        windows: Number of windows.
        batch_size: Windows of one batch on one rank.
        rank: This rank.
        world_size: R, the number of ranks.
        seed: Seed of the order.
    """

    def __init__(self, windows: int, batch_size: int, rank: int, world_size: int, seed: int) -> None:
        super().__init__(range(windows), num_replicas=world_size, rank=rank, seed=seed)  # type: ignore[arg-type]
        self.windows = windows
        self.batches = windows // (batch_size * world_size)
        self.batch_size = batch_size
        self.first_batch = 0
        """Where the next iteration starts; its length stays that of the whole epoch."""

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def __iter__(self) -> Iterator[int]:
        digest = hashlib.sha256(f"order {self.seed} {self.epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        order = torch.randperm(self.windows, generator=generator)
        mine = order[self.rank :: self.num_replicas][: len(self)]
        return iter(mine[self.first_batch * self.batch_size :].tolist())


class EpochProgress:
    """How far training is in its epoch: the trainer's own count, which no prefetching runs ahead of.

    Args:
        trainer: A Lightning trainer.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    @property
    def processed(self) -> int:
        """Batches of this epoch that training has finished."""
        return self._trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]

    @property
    def complete(self) -> bool:
        """Whether these are all batches that the trainer wants of an epoch."""
        return self.processed >= self._trainer.num_training_batches


class ResumableLoader(DataLoader):
    """A `DataLoader` over a `TrainSampler` that Lightning saves into checkpoints and restores from them.

    Lightning makes the iterator of a resumed run before it tells the sampler the epoch, and a loader with workers runs
    ahead of training. So iteration starts lazily, at the first batch; the saved place is the trainer's own count of
    processed batches; and the place applies only if the epoch that begins is the one it was taken in.
    """

    progress: EpochProgress | None = None
    """What to save as done; without it, the number of batches handed out."""

    identity: DataIdentity = UNKNOWN
    """What the loader reads, saved with the place and compared with a checkpoint's."""

    _started: tuple[int, int] | None = None
    """Epoch and batches handed out of the iteration under way."""

    _pending: dict[str, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if not isinstance(self.sampler, TrainSampler):  # Lightning's overfit_batches puts a SequentialSampler here
            return super().__iter__()
        return self._iterate(self.sampler)

    def _iterate(self, sampler: TrainSampler) -> Iterator[Any]:
        pending, self._pending = self._pending, None
        resumed = pending is not None and pending["epoch"] == sampler.epoch
        first = pending["batches"] if pending is not None and resumed else 0
        sampler.first_batch = first
        self._started = (sampler.epoch, first)
        if first >= sampler.batches:
            return
        for done, batch in enumerate(super().__iter__(), start=first + 1):
            self._started = (sampler.epoch, done)
            yield batch

    def _settings(self) -> dict[str, int]:
        if not isinstance(self.sampler, TrainSampler):
            return {}
        return {name: int(getattr(self.sampler, name)) for name in ("windows", "batch_size", "num_replicas", "seed")}

    def state_dict(self) -> dict[str, Any]:
        """Epoch and batches done, with what the order depends on; the same on every rank."""
        if self._started is None:
            epoch = getattr(self.sampler, "epoch", 0)
            place = self._pending or {"epoch": epoch, "batches": 0}
        else:
            epoch, handed_out = self._started
            place = {"epoch": epoch, "batches": handed_out if self.progress is None else self.progress.processed}
        return {**place, **self._settings(), "data": self.identity.state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved place at the next iteration.

        Raises:
            ConfigurationError: The place is damaged, of other data, or inside an epoch whose order was another one.
        """
        here = self._settings()
        self.identity.compare(state.get("data") if isinstance(state, dict) else state)
        if not is_place(state, ("epoch", "batches", *(("windows", "batch_size", "num_replicas") if here else ()))):
            self.identity.refuse(f"the checkpoint holds no place in training data of this kind ({state!s:.80})")
            return
        differing = [name for name in here if state.get(name) != here[name]]
        if differing and 0 < state["batches"] < state["windows"] // max(1, state["batch_size"] * state["num_replicas"]):
            saved = ", ".join(f"{name} {state.get(name)}" for name in differing)
            found = ", ".join(f"{name} {here[name]}" for name in differing)
            self.identity.refuse(
                f"the checkpoint is {state['batches']} batches into epoch {state['epoch']} with {saved}; this run has "
                f"{found}: resume with the same values or from a checkpoint at the end of an epoch"
            )
        self._pending = {"epoch": state["epoch"], "batches": state["batches"]}
        self._started = None


def is_place(state: Any, names: Iterable[str]) -> bool:
    """Whether what a checkpoint says is a dictionary with these numbers, none of them negative."""
    return isinstance(state, dict) and all(type(state.get(name)) is int and state[name] >= 0 for name in names)
