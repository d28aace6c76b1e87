"""The part of a module that accumulates and logs the loss of a validation or a test."""

import math
from typing import Any, cast

import lightning as L
from torch import Tensor, nn

from orthotrain.metrics import TokenLoss, bits_per_byte, count_targets


class EvaluatedModule(L.LightningModule):
    """A LightningModule that logs its mean loss over the batches of ``val`` and ``test``, and metrics of that loss.

    Attributes:
        evaluation_loss: Split -> the metric that accumulates its loss.
    """

    evaluation_loss: nn.ModuleDict

    def loss(self, batch: Any) -> Tensor:
        """Return the mean loss of a batch."""
        raise NotImplementedError

    @property
    def logs_perplexity(self) -> bool:
        """Whether the loss is a cross-entropy in nats per token; override if a :meth:`loss` of your own is."""
        return False

    def split_loss(self, split: str) -> TokenLoss:
        """Return the metric that accumulates the loss of ``val`` or ``test``."""
        return cast(TokenLoss, self.evaluation_loss[split])

    def evaluation_metrics(self, loss: float, split: str) -> dict[str, float]:
        """Return the metrics to log for a split, from its mean loss."""
        if not self.logs_perplexity:
            return {"loss": loss}
        metrics = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        bytes_per_token = getattr(getattr(self.trainer, "datamodule", None), "bytes_per_token", None)
        if bytes_per_token is not None:
            metrics["bits_per_byte"] = bits_per_byte(loss, bytes_per_token(split))
        return metrics

    def reset_metrics(self, split: str) -> None:
        """Clear the accumulated metrics of a split.

        This is done at the start of an evaluation and not at its end: ``validate`` runs in inference mode, and a later
        ``fit`` cannot update tensors that were created there.
        """
        self.split_loss(split).reset()

    def on_validation_epoch_start(self) -> None:
        """Clear the validation metrics."""
        self.reset_metrics("val")

    def on_test_epoch_start(self) -> None:
        """Clear the test metrics."""
        self.reset_metrics("test")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Add one batch to the validation loss."""
        self._evaluate("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Add one batch to the test loss."""
        self._evaluate("test", batch)

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics."""
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Log the test metrics."""
        self._log_evaluation("test")

    def _evaluate(self, split: str, batch: Any) -> None:
        self.split_loss(split).update(self.loss(batch), count_targets(batch))

    def _log_evaluation(self, split: str) -> None:
        metrics = self.evaluation_metrics(float(self.split_loss(split).compute()), split)
        self.log_dict({f"{split}_{name}": value for name, value in metrics.items()}, prog_bar=True)
