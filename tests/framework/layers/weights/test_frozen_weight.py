"""DenseWeight, and what every storage keeps in place and rounds without bias."""

import pytest
import torch

from orthotrain.layers import DenseWeight
from orthotrain.layers.weights.rounding import Noise
from orthotrain.layers.weights.storage import store


def test_is_never_trained_and_reloads():
    weight = DenseWeight(torch.randn(4, 6))
    assert not any(p.requires_grad for p in weight.parameters())
    fresh = DenseWeight(torch.zeros(4, 6))
    fresh.load_state_dict(weight.state_dict())
    assert torch.equal(fresh.dequantize(), weight.dequantize())


def test_holds_the_weight_without_a_copy():
    source = torch.randn(4, 6)
    assert DenseWeight(source).dequantize().data_ptr() == source.data_ptr()
    assert DenseWeight(source).dequantize(torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("noise", [None, Noise(0)], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("storage", ["dense", "bf16", "residual", "int8", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_is_stored_where_the_one_before_it_was(storage, dtype, noise):
    weight = store(torch.randn(16, 64).to(dtype), storage)
    places = {name: p.data_ptr() for name, p in weight.named_parameters()}
    weight.assign_(torch.randn(16, 64), noise)
    assert places == {name: p.data_ptr() for name, p in weight.named_parameters()}


@pytest.mark.parametrize("storage", ["dense", "bf16", "residual", "int8", "nf4"])
def test_noise_rounds_each_value_without_bias(storage):
    """The mean of 64 roundings is as near as independent draws make it; to nearest, no draw would differ."""
    exact = torch.randn(32, 64)
    weight = store(exact.to(torch.bfloat16 if storage == "dense" else torch.float32), storage)
    draws = []
    for count in range(64):
        weight.assign_(exact, Noise("layer", count))
        draws.append(weight.dequantize(torch.float32).clone())
    deviations, means = torch.std_mean(torch.stack(draws), 0)
    varied = deviations > 0  # but for the largest of a group, and values that are exact
    assert varied.float().mean() > 0.9
    errors = (means - exact)[varied] / (deviations[varied] / 8)  # in standard errors of the mean
    assert 0.5 < errors.abs().median() < 0.9 and errors.mean().abs() < 0.1
