"""The token loss against the perplexity of torchmetrics, and bits per byte."""

import math

import pytest
import torch
from torch.nn import functional as F
from torchmetrics.text import Perplexity

from orthotrain.metrics import TokenLoss, bits_per_byte, count_targets


def test_is_torchmetrics_perplexity_over_uneven_batches():
    mean, reference = TokenLoss(), Perplexity(ignore_index=-100)
    for rows in (3, 1, 2):
        logits = torch.randn(rows, 5, 11)
        labels = torch.randint(0, 11, (rows, 5))
        labels[0, :rows] = -100
        mean.update(F.cross_entropy(logits.flatten(0, 1), labels.flatten()), count_targets({"labels": labels}))
        reference.update(logits, labels)
    assert math.exp(mean.compute()) == pytest.approx(float(reference.compute()), rel=1e-5)


def test_a_batch_that_is_nan_shows_and_one_without_targets_does_not():
    """By default torchmetrics ignores NaN, and the mean of the other batches looks good."""
    mean = TokenLoss()
    mean.update(torch.tensor(2.0), 3)
    mean.update(torch.tensor(float("nan")), 0)  # the value of cross_entropy if no label counts
    assert float(mean.compute()) == 2.0
    mean.update(torch.tensor(float("nan")), 1)
    mean.update(torch.tensor(1.0), 5)
    assert math.isnan(mean.compute())
    mean.reset()
    assert math.isnan(mean.compute()), "nothing was evaluated"


def test_bits_per_byte_of_a_uniform_byte_model_is_eight():
    assert bits_per_byte(math.log(256), 1.0) == pytest.approx(8.0)
    assert bits_per_byte(math.log(256), 4.0) == pytest.approx(2.0)


def test_a_batch_without_labels_counts_once():
    assert count_targets(torch.zeros(4)) == count_targets({"x": 1}) == 1
