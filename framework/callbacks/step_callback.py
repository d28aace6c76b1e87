"""The base of callbacks that act after each optimizer step."""

from typing import Any

import lightning as L


class StepCallback(L.Callback):
    """Calls :meth:`on_step_end` at the end of each training batch in which an optimizer step was taken.

    A micro-batch whose gradients are only accumulated takes no step. The last step before a checkpoint is not counted
    again in a run that resumes from it.

    Attributes:
        step_before: Optimizer steps that were taken before this batch.
    """

    step_before = 0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kw: Any) -> None:
        """Note the number of steps."""
        self.step_before = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kw: Any) -> None:
        """Call :meth:`on_step_end` if the batch ended with an optimizer step."""
        if trainer.global_step != self.step_before:
            self.on_step_end(trainer, pl_module)
        self.step_before = trainer.global_step  # a batch that a loader gives as None has no start

    def on_step_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Act after an optimizer step, which ``trainer.global_step`` counts already."""


def logged_step(trainer: L.Trainer) -> int:
    """Return the number that loggers give to the current step: Lightning counts from 0, so 9 for the tenth step."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped
