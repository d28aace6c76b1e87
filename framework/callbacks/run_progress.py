"""How far a run is: steps of the whole run, not of an epoch, with tokens per second and the time that is left."""

import math
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from orthotrain.callbacks.throughput import logs_at
from orthotrain.console.progress import Progress
from orthotrain.devices.host_reads import read_waits


class RunProgress(ProgressBar):
    """Show optimizer steps and evaluation batches: a bar on a terminal, lines in a log; the command line's default.

    The time that is left counts the validations so far in; it is not known for a run without an end. The loss is that
    of the last batch on a CPU, and that of the last step that was logged on a device, which the host would wait for.

    Args:
        seconds: Time between two lines in a log.
    """

    def __init__(self, seconds: float = 30.0) -> None:
        super().__init__()
        self.seconds = seconds
        self._enabled = True
        self._note = ""
        self._training: Progress | None = None
        self._evaluating: Progress | None = None

    def disable(self) -> None:
        """Show nothing: Lightning says so to all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Show again."""
        self._enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin at the step that a checkpoint left."""
        steps = trainer.estimated_stepping_batches
        total = None if math.isinf(steps) else int(steps)
        if self._enabled:
            first = trainer.global_step
            self._training = Progress("training", total, "steps", self.seconds, first, announce=True, delay=0)
            self._training.start()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count an optimizer step, or show that a micro-batch went by."""
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
        """Begin the validation."""
        batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        self._begin_evaluation("checking the validation" if trainer.sanity_checking else "validation", batches)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin the test."""
        self._begin_evaluation("test", trainer.num_test_batches)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin the predictions."""
        self._begin_evaluation("prediction", trainer.num_predict_batches)

    def _begin_evaluation(self, what: str, batches: list[int | float]) -> None:
        if not self._enabled:
            return
        total = sum(batches)
        self._evaluating = Progress(what, None if math.isinf(total) else total, "batches", self.seconds)
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
        """Say what came out."""
        self._end_evaluation()
        if self._training is not None and not trainer.sanity_checking:
            values = {name: value for name, value in trainer.callback_metrics.items() if name.startswith("val_")}
            said = ", ".join(f"{name} {float(value):.4g}" for name, value in values.items())
            rank_zero_info(f"step {trainer.global_step}: {said}")

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
        """Take the bar away."""
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Take the bar away, so that the terminal has its cursor back."""
        self._close()

    def _close(self) -> None:
        self._end_evaluation()
        if self._training is not None:
            self._training.close()
            self._training = None


def training_note(trainer: L.Trainer) -> str:
    """Return the loss and the throughput that were logged last."""
    logged = trainer.callback_metrics
    loss, rate = logged.get("train_loss"), logged.get("tokens_per_second")
    parts = [] if loss is None else [f"loss {float(loss):.3f}"]
    return ", ".join(parts if rate is None else [*parts, f"{float(rate):,.0f} tokens/s"])
