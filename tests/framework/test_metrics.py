"""The token loss against the perplexity of torchmetrics, and bits per byte."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchmetrics.text import Perplexity

from orthotrain.metrics import GenerationMetrics, TokenAccuracy, TokenLoss, bits_per_byte, count_targets


def test_is_torchmetrics_perplexity_over_uneven_batches():
    """Neither the mean of the batches' means nor a mean weighted by all labels is the mean over the targets."""
    generator, batches, reference = torch.Generator().manual_seed(0), [], Perplexity(ignore_index=-100)
    mean = TokenLoss()
    for rows, masked in ((3, 0), (1, 4), (2, 2)):
        logits = 4 / rows * torch.randn(rows, 5, 11, generator=generator)
        labels = torch.randint(0, 11, (rows, 5), generator=generator)
        labels[0, :masked] = -100
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        mean.update(loss, count_targets({"labels": labels}))
        reference.update(logits, labels)
        batches.append((float(loss), 5 * rows, 5 * rows - masked))
    expected = math.log(reference.compute())
    assert float(mean.compute()) == pytest.approx(expected, rel=1e-5)
    losses, labels, targets = zip(*batches, strict=True)
    for wrong in ((1, 1, 1), labels):
        assert abs(np.average(losses, weights=wrong) - expected) > 0.1
    assert np.average(losses, weights=targets) == pytest.approx(expected, rel=1e-5)


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


def test_exact_match_and_rouge():
    metrics = GenerationMetrics()
    metrics.update(["Return the sum.", "the file is closed"], ["Return the sum.\n", "Close the file"])
    # second text: the longest common subsequence is "the file": precision 2/4, recall 2/3, F = 4/7
    assert metrics.compute() == pytest.approx({"exact_match": 0.5, "rouge_l": (1 + 4 / 7) / 2})


def test_updates_accumulate_and_reset_forgets():
    together, apart = GenerationMetrics(), GenerationMetrics()
    together.update(["a b", "c"], ["a", "c"])
    apart.update(["a b"], ["a"])
    apart.update(["c"], ["c"])
    apart.update([], [])
    assert apart.compute() == pytest.approx(together.compute())
    apart.reset()
    apart.update(["c"], ["c"])
    assert apart.compute() == {"exact_match": 1.0, "rouge_l": 1.0}


def test_an_empty_answer_scores_nothing():
    metrics = GenerationMetrics()
    metrics.update([""], ["Close the file."])
    assert metrics.compute() == {"exact_match": 0.0, "rouge_l": 0.0}


def test_misuse_is_an_error():
    metrics = GenerationMetrics()
    with pytest.raises(RuntimeError, match="no texts yet"):
        metrics.compute()
    with pytest.raises(ValueError, match="2 predictions and 1 references"):
        metrics.update(["a", "b"], ["a"])


def test_token_accuracy_counts_responses_only():
    accuracy = TokenAccuracy()
    logits = torch.nn.functional.one_hot(torch.tensor([[1, 2, 3], [4, 0, 0]]), 5).float()
    accuracy.update(logits, torch.tensor([[-100, 2, 1], [4, -100, -100]]))
    accuracy.update(logits[:1], torch.tensor([[-100, -100, -100]]))
    assert float(accuracy.compute()) == pytest.approx(2 / 3)


@pytest.mark.parametrize(("place", "shows"), [((0, 1, 4), True), ((0, 0, 0), False)])
def test_token_accuracy_of_logits_that_are_nan_is_nan_where_they_count(place, shows):
    accuracy = TokenAccuracy()
    logits = torch.nn.functional.one_hot(torch.tensor([[1, 2, 3]]), 5).float()
    logits[place] = float("nan")
    accuracy.update(logits, torch.tensor([[-100, 2, 3]]))
    accuracy.update(torch.nn.functional.one_hot(torch.tensor([[1, 2, 3]]), 5).float(), torch.tensor([[1, 2, 3]]))
    assert bool(accuracy.compute().isnan()) == shows
