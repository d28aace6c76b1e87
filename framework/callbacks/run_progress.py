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

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kw: Any) -> None:
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
        """Start a validation, a test or the predictions."""
        if self._enabled:
            name, total = evaluated_batches(trainer)
            self._evaluating = Progress(name, None if math.isinf(total) else total, "batches", self.seconds)
            self._evaluating.start()

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Count a batch."""
        if self._evaluating is not None:
            self._evaluating.advance()

    on_test_start = on_predict_start = on_validation_start
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the metrics of a validation during training."""
        self.on_test_end()
        if self._training is not None and not trainer.sanity_checking:
            values = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("val_")}
            metrics = ", ".join(f"{name} {float(value):.4g}" for name, value in values.items())
            rank_zero_info(f"step {trainer.global_step}: {metrics}")

    def on_test_end(self, *args: Any, **kwargs: Any) -> None:
        """Remove the line of the test, the predictions or the validation."""
        if self._evaluating is not None:
            self._evaluating.close()
            self._evaluating = None

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Remove all lines, also after an error."""
        self.on_test_end()
        if self._training is not None:
            self._training.close()
            self._training = None

    on_predict_end, on_exception = on_test_end, on_train_end


def evaluated_batches(trainer: L.Trainer) -> tuple[str, float]:
    """Return the name of the evaluation that a trainer runs, and its batches on this rank (infinite if not known)."""
    if trainer.sanity_checking:
        return "checking the validation", sum(trainer.num_sanity_val_batches)
    if trainer.testing:
        return "test", sum(trainer.num_test_batches)
    if trainer.predicting:
        return "prediction", sum(trainer.num_predict_batches)
    return "validation", sum(trainer.num_val_batches)


def training_note(trainer: L.Trainer) -> str:
    """Return the last logged loss and throughput as text."""
    logged = trainer.callback_metrics
    loss, rate = logged.get("train_loss"), logged.get("tokens_per_second")
    parts = [] if loss is None else [f"loss {float(loss):.3f}"]
    return ", ".join(parts if rate is None else [*parts, f"{float(rate):,.0f} tokens/s"])
