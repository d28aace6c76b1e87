"""The low-rank baseline: wrapping and merging keep the function, ReLoRA's restarts raise the rank."""

import copy

import pytest
import torch
from torch import nn

from orthotrain.errors import ConfigurationError
from orthotrain.layers import LoraLinear, Mergeable


def trained(layer, scale=0.1):
    with torch.no_grad():
        layer.up.normal_(std=scale)
    return layer


@pytest.mark.parametrize("bias", [True, False])
def test_wrap_merge_unwrap_keep_the_function(bias):
    linear = nn.Linear(12, 9, bias=bias)
    layer = LoraLinear.from_linear(copy.deepcopy(linear), rank=3, alpha=6, seed=1)
    assert isinstance(layer, Mergeable)
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(layer(x), linear(x), rtol=0, atol=0)
    before = trained(layer)(x)
    expected = linear(x) + 2 * (x @ layer.down.T) @ layer.up.T
    torch.testing.assert_close(before, expected)
    torch.testing.assert_close(layer.unwrap()(x), before)
    down = layer.down.clone()
    layer.merge_()
    torch.testing.assert_close(layer(x), before)
    assert not layer.up.any() and not torch.equal(layer.down, down)


def test_merging_raises_the_rank():
    layer = LoraLinear.from_linear(nn.Linear(12, 9, bias=False), rank=2)
    start = layer.merged_weight().clone()
    for _ in range(3):
        trained(layer)
        layer.merge_()
    assert torch.linalg.matrix_rank(layer.merged_weight() - start, rtol=1e-4) == 6


def test_trains_only_its_factors_and_the_bias():
    layer = LoraLinear.from_linear(nn.Linear(12, 9), rank=2)
    names = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert names == {"down", "up", "bias"}


@pytest.mark.parametrize("rank", [0, 10])
def test_a_rank_that_does_not_fit_is_refused(rank):
    with pytest.raises(ConfigurationError, match=f"rank={rank}: a 9 x 12 weight takes 1 to 9"):
        LoraLinear.from_linear(nn.Linear(12, 9), rank=rank)
