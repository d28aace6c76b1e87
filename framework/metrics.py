"""Metrics of language models: loss and accuracy per token, and scores of generated texts.

:class:`BytesPerToken` and :func:`bits_per_byte` make losses comparable, and :func:`count_targets` weights them.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.text.rouge import ROUGEScore


class TokenLoss(MeanMetric):
    """Mean negative log-likelihood in nats per token, weighted by tokens and synchronized over ranks.

    Its ``exp`` is the perplexity; :func:`bits_per_byte` makes it comparable across tokenizers.
    """

    higher_is_better = False  # type: ignore[assignment]

    def update(self, loss: Tensor | float, targets: int) -> None:  # type: ignore[override]
        """Add a batch; a batch without targets, whose mean loss is NaN, adds nothing.

        Args:
            loss: Mean loss of the batch. NaN makes the mean over all batches NaN.
            targets: Number of tokens over which the loss is the mean.
        """
        if targets:  # not MeanMetric.update, which drops NaN values, or else the weights
            self.mean_value += torch.as_tensor(loss, dtype=self.dtype, device=self.device) * targets
            self.weight += targets


class BytesPerToken(Metric):
    """UTF-8 bytes of the text of the evaluated tokens over their number, synchronized over ranks."""

    text_bytes: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("text_bytes", "tokens"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, text_bytes: float, tokens: int) -> None:
        """Add the bytes of some tokens."""
        self.text_bytes += round(text_bytes)
        self.tokens += tokens

    def compute(self) -> Tensor:
        """Return the quotient; NaN without tokens."""
        return self.text_bytes / self.tokens


class TokenAccuracy(MeanMetric):
    """Share of response tokens whose most likely prediction is right, synchronized over ranks."""

    higher_is_better = True  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__(nan_strategy="disable")

    def update(self, logits: Tensor, labels: Tensor, ignore_index: int = -100) -> None:  # type: ignore[override]
        """Add a batch; NaN among the logits of a counted position makes the share NaN.

        Args:
            logits: Shape ``(..., vocabulary)``.
            labels: Shape ``(...)``: the token that each position should predict.
            ignore_index: The label that does not count.
        """
        counted = labels != ignore_index
        if counted.any():
            largest, predicted = logits.max(-1)  # max takes NaN as larger than any number
            hits = (predicted == labels).float().masked_fill(largest.isnan(), torch.nan)
            super().update(hits[counted])


class GenerationMetrics(nn.Module):
    """Exact match and ROUGE-L of generated texts, synchronized over ranks.

    Exact match ignores white space around a text. ROUGE-L is the F-measure of the longest common subsequence of
    lower-case words (Lin, 2004), averaged over texts; words are runs of Latin letters and digits.

    Example:
        >>> metrics = GenerationMetrics()
        >>> metrics.update(["Return the sum.", "no"], ["Return the sum.", "Close the file."])
        >>> {name: round(value, 2) for name, value in metrics.compute().items()}
        {'exact_match': 0.5, 'rouge_l': 0.5}
    """

    def __init__(self) -> None:
        super().__init__()
        self.exact_match = MeanMetric()
        self.rouge = ROUGEScore(rouge_keys="rougeL")

    def update(self, predictions: Sequence[str], references: Sequence[str]) -> None:
        """Add texts.

        Args:
            predictions: Texts that the model wrote.
            references: The text that it should have written, for each prediction.

        Raises:
            ValueError: If the numbers of predictions and references differ.
        """
        if len(predictions) != len(references):
            raise ValueError(f"{len(predictions)} predictions and {len(references)} references: must be as many")
        if not predictions:
            return
        pairs = zip(predictions, references, strict=True)
        self.exact_match.update(torch.tensor([float(text.strip() == expected.strip()) for text, expected in pairs]))
        self.rouge.update(list(predictions), list(references))

    def compute(self) -> dict[str, float]:
        """Return ``exact_match`` and ``rouge_l``, both between 0 and 1.

        Raises:
            RuntimeError: If no text was added.
        """
        if not self.exact_match.update_called:
            raise RuntimeError("GenerationMetrics has no texts yet: call update() first")
        rouge = self.rouge.compute()
        return {"exact_match": float(self.exact_match.compute()), "rouge_l": float(rouge["rougeL_fmeasure"])}

    def reset(self) -> None:
        """Drop all texts."""
        self.exact_match.reset()
        self.rouge.reset()


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """Convert a loss in nats per token to bits per UTF-8 byte of the text.

    Args:
        nats_per_token: Mean negative log-likelihood.
        bytes_per_token: Bytes of the text of the evaluated tokens divided by their number. With 0 bytes (only special
            tokens) the result is infinite.
    """
    return nats_per_token / math.log(2) / bytes_per_token if bytes_per_token else math.inf


def count_labels(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Return the number of labels that count, a scalar on their device. Of a regression all count: -100 is a number."""
    counts = torch.ones_like(labels, dtype=torch.bool) if labels.is_floating_point() else labels != ignore_index
    return counts.sum()


def count_targets(batch: object, ignore_index: int = -100) -> int:
    """Return the number of labels of a batch that count, or 1 if the batch has no ``labels``."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    return int(count_labels(labels, ignore_index)) if isinstance(labels, Tensor) else 1
