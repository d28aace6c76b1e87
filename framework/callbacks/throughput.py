"""Training tokens per second of all ranks together."""

import functools
from collections.abc import Mapping
from time import perf_counter
from typing import Any

import lightning as L
import torch
from torch import Tensor

from orthotrain.devices.host_reads import host_number


class Throughput(L.Callback):
    """Log ``tokens_per_second`` with the trainer's step metrics.

    The clock starts at the end of the first optimizer step of a process, which allocates and compiles, before the fold
    of this step, and stops after the fold or merge of the last step. It includes data, folds and merges, the optimizer,
    logging and all other callbacks. It excludes validations and the writing of checkpoints. A resumed run counts its
    own steps, without the first one. :attr:`mean` is the mean over all steps. A run whose batches have no tokens logs
    nothing.
    """

    def __init__(self) -> None:
        self._begin(0)

    def _begin(self, step: int) -> None:
        self._tokens = self._window_tokens = 0
        self._seconds = self._window_seconds = 0.0
        self._first_step = step
        self._mark: float | None = None  # end of the counted time; None while the clock is stopped
        self._stopped = False  # by the current validation

    @property
    def mean(self) -> float:
        """Tokens per second over the training steps so far; 0 before the second one has ended."""
        return self._tokens / self._seconds if self._seconds else 0.0

    @property
    def counted(self) -> tuple[int, float]:
        """Tokens and seconds so far, without the first step."""
        return self._tokens, self._seconds

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reset the clock, and stop it while a checkpoint is written, for which Lightning has no hook."""
        self._begin(trainer.global_step)
        save = trainer.save_checkpoint

        @functools.wraps(save)
        def timed(*args: Any, **kwargs: Any) -> None:
            running = self._stop(trainer)
            save(*args, **kwargs)
            self._go_on(running)

        trainer.save_checkpoint = timed  # type: ignore[method-assign]

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restore the method of the trainer."""
        vars(trainer).pop("save_checkpoint", None)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a batch, and log every ``log_every_n_steps``."""
        if self._mark is None:
            if trainer.global_step != self._first_step:
                self._mark = perf_counter()
            return
        self._lap()
        tokens = count_inputs(batch) * trainer.world_size
        self._tokens, self._window_tokens = self._tokens + tokens, self._window_tokens + tokens
        if logs_at(trainer, trainer.fit_loop.total_batch_idx + 1) and self._window_tokens:
            rate = host_number(self._window_tokens / self._window_seconds)
            pl_module.log("tokens_per_second", rate, prog_bar=True)
            self._window_tokens, self._window_seconds = 0, 0.0

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count what other callbacks did after the last step, such as its merge."""
        self._stop(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock."""
        self._stopped = self._stop(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock again."""
        self._go_on(self._stopped)

    def _lap(self) -> None:
        assert self._mark is not None
        now = perf_counter()
        self._seconds, self._window_seconds = self._seconds + now - self._mark, self._window_seconds + now - self._mark
        self._mark = now

    def _stop(self, trainer: L.Trainer) -> bool:
        """Stop the clock, and return whether it was running."""
        running = self._mark is not None
        if running:
            if trainer.strategy.root_device.type == "cuda":  # the pending work of the device belongs to the training
                torch.cuda.synchronize(trainer.strategy.root_device)
            self._lap()
        self._mark = None
        return running

    def _go_on(self, running: bool) -> None:
        self._mark = perf_counter() if running else None


def logs_at(trainer: L.Trainer, count: int) -> bool:
    """Tell whether the trainer logs at step ``count`` (from 1): every ``log_every_n_steps``; never if that is 0."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and count % every == 0


def count_inputs(batch: Any) -> int:
    """Return the number of input tokens of a batch, 0 if it has no ``input_ids``."""
    inputs = batch.get("input_ids") if isinstance(batch, Mapping) else None
    return inputs.numel() if isinstance(inputs, Tensor) else 0
