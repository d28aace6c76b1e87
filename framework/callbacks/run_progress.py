"""Progress of a run: steps of the whole run, not of an epoch, with tokens per second and the remaining time."""

import math
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from orthotrain.callbacks.throughput import logs_at
from orthotrain.console.progress import Progress
from orthotrain.devices.host_reads import read_waits


class RunProgress(ProgressBar):
    """Show optimizer steps and evaluation batches: a bar on a terminal, lines in a log.

    The command line adds this callback to every run. The remaining time includes validations at their rate so far. A
    run without an end shows none. On a CPU the loss is that of the last batch. On another device it is that of the last
    logged step, because reading a newer loss would make the host wait.

    Args:
        seconds: Time between two log lines.
    """

    def __init__(self, seconds: float = 30.0) -> None:
        super().__init__()
        self.seconds = seconds
        self._enabled = True
        self._note = ""
        self._training: Progress | None = None
        self._evaluating: Progress | None = None

    def disable(self) -> None:
        """Show nothing; Lightning calls this method on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show again."""
        self._enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start at the step of the checkpoint, or at 0."""
        steps = trainer.estimated_stepping_batches
        total = None if math.isinf(steps) else int(steps)
        if self._enabled:
            first = trainer.global_step
            self._training = Progress("training", total, "steps", self.seconds, first, announce=True, delay=0)
            self._training.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count an optimizer step, or redraw the line after a micro-batch."""
        if self._training is None:
            return
        stepped = trainer.global_step - self._training.done
        if not read_waits(pl_module.device):
            self._training.advance(stepped, lambda: training_note(trainer))
            return
        if stepped and logs_at(trainer, trainer.global_step):
            self._note = training_note(trainer)
        self._training.advance(stepped, lambda: self._note)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the validation."""
        batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        self._start_evaluation("checking the validation" if trainer.sanity_checking else "validation", batches)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the test."""
        self._start_evaluation("test", trainer.num_test_batches)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the predictions."""
        self._start_evaluation("prediction", trainer.num_predict_batches)

    def _start_evaluation(self, name: str, batches: list[int | float]) -> None:
        if not self._enabled:
            return
        total = sum(batches)
        self._evaluating = Progress(name, None if math.isinf(total) else total, "batches", self.seconds)
        self._evaluating.start()

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Count a batch."""
        self._advance()

    def on_test_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Count a batch."""
        self._advance()

    def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Count a batch."""
        self._advance()

    def _advance(self) -> None:
        if self._evaluating is not None:
            self._evaluating.advance()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the metrics of a validation during training."""
        self._end_evaluation()
        if self._training is not None and not trainer.sanity_checking:
            values = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("val_")}
            metrics = ", ".join(f"{name} {float(value):.4g}" for name, value in values.items())
            rank_zero_info(f"step {trainer.global_step}: {metrics}")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End the test."""
        self._end_evaluation()

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End the predictions."""
        self._end_evaluation()

    def _end_evaluation(self) -> None:
        if self._evaluating is not None:
            self._evaluating.close()
            self._evaluating = None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove the bar."""
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Remove the bar, so that the terminal shows its cursor again."""
        self._close()

    def _close(self) -> None:
        self._end_evaluation()
        if self._training is not None:
            self._training.close()
            self._training = None


def training_note(trainer: L.Trainer) -> str:
    """Return the last logged loss and throughput as text."""
    logged = trainer.callback_metrics
    loss, rate = logged.get("train_loss"), logged.get("tokens_per_second")
    parts = [] if loss is None else [f"loss {float(loss):.3f}"]
    return ", ".join(parts if rate is None else [*parts, f"{float(rate):,.0f} tokens/s"])
