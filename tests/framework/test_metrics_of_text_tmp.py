"""Metrics of answers against values worked out by hand."""

import pytest
import torch

from orthotrain.metrics import GenerationMetrics, TokenAccuracy


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
