"""The part of a module that accumulates and logs the loss of a validation or a test."""

import math
from collections.abc import Mapping
from typing import Any, cast

import lightning as L
from torch import Tensor, nn

from orthotrain.metrics import BytesPerToken, TokenLoss, bits_per_byte, count_targets


class EvaluatedModule(L.LightningModule):
    """A LightningModule that logs its mean loss over the batches of ``val`` and ``test``, and metrics of that loss.

    Attributes:
        evaluation_loss: Split -> the metric that accumulates its loss.
        evaluation_bytes: Split -> the metric that accumulates the bytes of the text of its targets.
    """

    evaluation_loss: nn.ModuleDict
    evaluation_bytes: nn.ModuleDict

    def __init__(self) -> None:
        super().__init__()
        self.evaluation_loss = nn.ModuleDict({split: TokenLoss() for split in ("val", "test")})
        self.evaluation_bytes = nn.ModuleDict({split: BytesPerToken() for split in ("val", "test")})

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

    def split_bytes(self, split: str) -> BytesPerToken:
        """Return the metric that accumulates the bytes of the text of ``val`` or ``test``."""
        return cast(BytesPerToken, self.evaluation_bytes[split])

    def evaluation_metrics(self, loss: float, split: str) -> dict[str, float]:
        """Return the metrics to log for a split, from its mean loss."""
        if not self.logs_perplexity:
            return {"loss": loss}
        metrics = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        if self.split_bytes(split).update_called:
            metrics["bits_per_byte"] = bits_per_byte(loss, float(self.split_bytes(split).compute()))
        return metrics

    def reset_metrics(self, split: str) -> None:
        """Clear the accumulated metrics of a split.

        This is done at the start of an evaluation and not at its end: ``validate`` runs in inference mode, and a later
        ``fit`` cannot update tensors that were created there.
        """
        self.split_loss(split).reset()
        self.split_bytes(split).reset()

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
        self._count(split, self.loss(batch), batch.get("labels") if isinstance(batch, Mapping) else None)

    def _count(self, split: str, loss: Tensor, labels: Tensor | None) -> None:
        """Add the mean loss of a batch to the loss of a split, and the text of its targets to the bytes of the split.

        Args:
            split: ``val`` or ``test``.
            loss: Mean over the labels that are not -100.
            labels: The tokens that the batch predicts. ``None``: the batch counts once, and has no bytes.
        """
        targets = count_targets({"labels": labels})
        self.split_loss(split).update(loss, targets)
        text_bytes = getattr(getattr(self.trainer, "datamodule", None), "text_bytes", None)
        if text_bytes is not None and labels is not None and self.logs_perplexity:
            self.split_bytes(split).update(text_bytes(labels, split), targets)

    def _log_evaluation(self, split: str) -> None:
        metrics = self.evaluation_metrics(float(self.split_loss(split).compute()), split)
        self.log_dict({f"{split}_{name}": value for name, value in metrics.items()}, prog_bar=True)
