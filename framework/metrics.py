"""Metrics of language models on top of torchmetrics."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics import MeanMetric


class TokenLoss(MeanMetric):
    """Mean negative log-likelihood in nats per token, weighted by tokens and synchronised over ranks.

    ``exp`` of it is the perplexity; :func:`bits_per_byte` makes it comparable across tokenizers.
    """

    higher_is_better = False  # type: ignore[assignment]

    def update(self, loss: Tensor | float, targets: int) -> None:  # type: ignore[override]
        """Add a batch; one without targets has no loss (the mean over none of them is NaN) and adds nothing.

        Args:
            loss: Mean loss of the batch. NaN makes the mean over all batches NaN.
            targets: How many tokens it is the mean of.
        """
        if targets:  # not MeanMetric.update: it leaves out what is NaN, or else the weights
            self.mean_value += torch.as_tensor(loss, dtype=self.dtype, device=self.device) * targets
            self.weight += targets


def count_targets(batch: object, ignore_index: int = -100) -> int:
    """Return the number of labels of a batch that count, or 1 where a batch has no ``labels``."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    return int((labels != ignore_index).sum()) if isinstance(labels, Tensor) else 1


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """Convert a loss in nats per token to bits per UTF-8 byte of the text.

    Args:
        nats_per_token: Mean negative log-likelihood.
        bytes_per_token: Bytes of the text over its number of tokens.
    """
    return nats_per_token / math.log(2) / bytes_per_token
