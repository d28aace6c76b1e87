"""Evaluation mode turns dropout off and nothing else: a layer has the gradients that it has in training mode."""

import copy

import pytest
import torch
from torch import nn

from orthotrain.layers import (
    LoraLinear,
    OftConv2d,
    OftEmbedding,
    OftLinear,
    OftSettings,
    PoetLinear,
    PoetSettings,
    StepwiseLinear,
)


def stepwise(**options):
    return lambda: StepwiseLinear.from_settings(nn.Linear(64, 32), PoetSettings(block_size=8, stepwise=True, **options))


LAYERS = {
    **{f"step-wise, {route}": stepwise(route=route) for route in ("input", "weight", "auto")},
    "step-wise, scaled": stepwise(trained_scale=True),
    "step-wise, residual": stepwise(storage="residual"),
    "POET": lambda: PoetLinear.from_linear(nn.Linear(64, 32), block_size=8),
    "OFT": lambda: OftLinear.from_linear(nn.Linear(64, 32), 8),
    "LoRA": lambda: LoraLinear.from_linear(nn.Linear(64, 32), 4),
    "OFT convolution": lambda: OftConv2d.from_settings(nn.Conv2d(8, 4, 3), OftSettings(8)),
    "OFT embedding": lambda: OftEmbedding.from_settings(nn.Embedding(16, 8), OftSettings(8)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_in_evaluation_mode_are_those_of_training_mode(kind):
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    if isinstance(layer, OftConv2d):
        x = torch.randn(2, 8, 5, 5)
    elif isinstance(layer, OftEmbedding):
        x = torch.randint(0, 16, (3, 5))
    else:
        x = torch.randn(3, 5, 64)
    found = []
    for training in (True, False):
        other = copy.deepcopy(layer).train(training)
        other(x).pow(3).sum().backward()
        found.append({name: p.grad for name, p in other.named_parameters() if p.requires_grad})
    assert any(gradient.abs().sum() > 0 for gradient in found[0].values())
    for name, gradient in found[0].items():
        assert gradient is not None and torch.equal(gradient, found[1][name]), name


@pytest.mark.parametrize("kind", ["step-wise, input", "step-wise, weight"])
def test_without_gradients_nothing_is_kept_for_them(kind):
    layer = LAYERS[kind]()
    with torch.no_grad():
        assert layer(torch.randn(3, 64)).grad_fn is None
