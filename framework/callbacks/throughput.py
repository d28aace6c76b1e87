"""Training tokens per second, of all ranks together."""

import time
from typing import Any

import lightning as L
from torch import Tensor

from orthotrain.host_reads import host_number


class Throughput(L.Callback):
    """Log ``tokens_per_second`` with the trainer's step metrics; validation and checkpoints do not count.

    The mean over the whole run is kept in :attr:`mean`; a run whose batches hold no tokens logs nothing.
    """

    def __init__(self) -> None:
        self._tokens = self._window_tokens = 0
        self._seconds = self._window_seconds = 0.0
        self._started = 0.0

    @property
    def mean(self) -> float:
        """Tokens per second over all training steps so far."""
        return self._tokens / self._seconds if self._seconds else 0.0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop the clock and log at the trainer's cadence."""
        seconds = time.perf_counter() - self._started
        tokens = count_inputs(batch) * trainer.world_size
        self._tokens, self._seconds = self._tokens + tokens, self._seconds + seconds
        self._window_tokens, self._window_seconds = self._window_tokens + tokens, self._window_seconds + seconds
        if logs_at(trainer, trainer.fit_loop.total_batch_idx + 1) and self._window_tokens:
            rate = host_number(self._window_tokens / self._window_seconds)
            pl_module.log("tokens_per_second", rate, prog_bar=True)
            self._window_tokens, self._window_seconds = 0, 0.0


def logs_at(trainer: L.Trainer, count: int) -> bool:
    """Tell whether the trainer logs at step ``count`` (from 1): every ``log_every_n_steps``, 0 being never."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and count % every == 0


def count_inputs(batch: Any) -> int:
    """Return the number of input tokens of a batch, 0 where it has no ``input_ids``."""
    inputs = batch.get("input_ids") if isinstance(batch, dict) else None
    return inputs.numel() if isinstance(inputs, Tensor) else 0
