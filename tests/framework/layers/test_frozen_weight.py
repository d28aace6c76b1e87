"""DenseWeight and stochastic rounding."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthotrain.layers import DenseWeight
from orthotrain.layers.frozen_weight import stochastic_round


def test_is_never_trained_and_reloads():
    weight = DenseWeight(torch.randn(4, 6))
    assert not any(p.requires_grad for p in weight.parameters())
    fresh = DenseWeight(torch.zeros(4, 6))
    fresh.load_state_dict(weight.state_dict())
    assert torch.equal(fresh.dequantize(), weight.dequantize())


def test_holds_the_weight_without_a_copy_and_replaces_it_without_touching_it():
    source = torch.randn(4, 6)
    before = source.clone()
    weight = DenseWeight(source)
    assert weight.dequantize().data_ptr() == source.data_ptr()
    weight.assign_(torch.zeros(4, 6))
    assert torch.equal(source, before) and not weight.dequantize().any()
    assert DenseWeight(source, torch.bfloat16).dequantize().dtype == torch.bfloat16


@settings(max_examples=100, deadline=None)
@given(
    st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**100), max_value=2.0**100),
    st.integers(0, 99),
)
def test_rounds_to_a_neighbour_and_keeps_what_is_exact(value, seed):
    x = torch.tensor([value], dtype=torch.float32)
    rounded = stochastic_round(x, torch.Generator().manual_seed(seed)).float()
    assert (rounded - x).abs() <= 2.0**-7 * x.abs() + 1e-38
    exact = x.bfloat16()
    assert torch.equal(stochastic_round(exact.float(), torch.Generator().manual_seed(seed)), exact)


def test_stochastic_rounding_is_unbiased():
    x = torch.full((200_000,), 1.001)
    mean = stochastic_round(x, torch.Generator().manual_seed(0)).double().mean()
    # an ulp is 2^-7 here; the standard error of the mean is under 2^-7 / 2 / sqrt(200000)
    assert abs(mean - 1.001) < 5 * 2.0**-8 / 200_000**0.5
    assert x.bfloat16().double().mean() == 1.0


def test_infinities_and_nan_pass():
    x = torch.tensor([float("inf"), -float("inf"), float("nan")])
    rounded = stochastic_round(x, torch.Generator().manual_seed(0))
    assert rounded[0] == float("inf") and rounded[1] == -float("inf") and rounded[2].isnan()
