"""DenseWeight, and what every storage keeps in place."""

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
