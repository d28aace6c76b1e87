"""What bitsandbytes has quantized and nothing wraps: gradients that outlive an evaluation, a state that reloads."""

import io

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from orthotrain.errors import ConfigurationError
from orthotrain.layers import FrozenLinear, OftLinear, mergeable_layers, unwrap_mergeables
from orthotrain.layers.weights.bitsandbytes_linear import is_bitsandbytes
from orthotrain.layers.weights.frozen_linear import frozen_linears
from orthotrain.models import CausalLM, PretrainedModel
from orthotrain.modules import OftLayers

IDS = torch.arange(24).view(2, 12)


@pytest.fixture
def build(tiny_llama, tmp_path):
    """Returns a function that builds a Llama of which transformers has quantized every linear, the head too."""
    sizes = {"hidden_size": 128, "intermediate_size": 128, "initializer_range": 0.2}
    CausalLM({**tiny_llama, **sizes})().save_pretrained(tmp_path / "base")

    def built(dtype="float32", include=("*q_proj",)):
        network = PretrainedModel(str(tmp_path / "base"), dtype=dtype, load_in_4bit=True)()
        head = bnb.nn.Linear4bit(128, 96, bias=False, quant_type="nf4", compute_dtype=network.dtype)
        head.weight = bnb.nn.Params4bit(network.lm_head.weight.data.clone(), requires_grad=False, quant_type="nf4")
        network.lm_head = head.to("cpu")
        before = network.train()(IDS).logits  # in training mode bitsandbytes repacks nothing
        OftLayers(block_size=16, include=list(include)).apply_(network)
        return network, before

    return built


def gradients(network):
    network.train().zero_grad()
    network(IDS, labels=IDS).loss.backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_the_same_after_an_evaluation(build, dtype):
    network, before = build(dtype)
    assert not any(is_bitsandbytes(module) for module in network.modules())
    assert isinstance(network.lm_head, FrozenLinear)
    torch.testing.assert_close(network(IDS).logits, before, rtol=1e-4, atol=1e-4 if dtype == "float32" else 0.5)
    first = gradients(network)
    with torch.no_grad():
        network.eval()(IDS)
    second = gradients(network)
    assert len(first) == 2
    for name, gradient in first.items():
        assert gradient.norm() > 0 and torch.equal(gradient, second[name])


def test_the_state_does_not_change_with_use_and_reloads(build, randomize):
    network, _ = build()
    randomize(network)
    keys = set(network.state_dict())
    with torch.no_grad():
        expected = network.eval()(IDS).logits
    buffer = io.BytesIO()
    torch.save(network.state_dict(), buffer)
    buffer.seek(0)
    twin, _ = build()
    assert set(twin.state_dict()) == keys == set(network.state_dict())
    twin.load_state_dict(torch.load(buffer, weights_only=True))
    with torch.no_grad():
        assert torch.equal(twin.eval()(IDS).logits, expected)


def test_unwrapping_leaves_plain_linears_that_compute_the_same(build, randomize):
    network, _ = build()
    with torch.no_grad():
        expected = randomize(network).eval()(IDS).logits
        unwrap_mergeables(network)
        assert all(type(m) is nn.Linear for n, m in network.named_modules() if n.endswith(("_proj", "lm_head")))
        torch.testing.assert_close(network(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_unwrapping_plain_linears_of_bitsandbytes_too():
    network = nn.Sequential(nn.Linear(64, 64), bnb.nn.Linear4bit(64, 48, quant_type="nf4")).to("cpu")
    x = torch.randn(3, 64)
    expected = network(x).detach()
    assert unwrap_mergeables(network) == []
    assert type(network[1]) is nn.Linear
    torch.testing.assert_close(network(x), expected, rtol=1e-5, atol=1e-5)


def test_a_format_that_cannot_be_taken_over_is_refused_by_name_and_nothing_is_changed():
    network = nn.Sequential(nn.Linear(64, 64), bnb.nn.Linear4bit(64, 64)).to("cpu")
    with pytest.raises(ConfigurationError, match="layer 1: quant_type='fp4'"):
        frozen_linears(network)
    with pytest.raises(ConfigurationError, match="layer 1: quant_type='fp4'"):
        OftLayers(block_size=8, include=["0"]).apply_(network)
    assert type(network[0]) is nn.Linear and network[0].weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eight_bits_without_bias_compute_in_the_networks_dtype(dtype):
    def built():
        quantized = [bnb.nn.Linear8bitLt(64, 64, bias=False, has_fp16_weights=False) for _ in range(2)]
        return nn.Sequential(nn.Linear(64, 64).to(dtype), *(layer.to("cpu") for layer in quantized))

    network = built()
    OftLayers(block_size=8, include=["1"]).apply_(network)
    assert [type(layer) for layer in network] == [nn.Linear, OftLinear, FrozenLinear]
    assert {network[1].weight.compute_dtype, network[2].weight.compute_dtype} == {dtype}
    assert network(torch.full((1, 64), 1e6, dtype=dtype)).isfinite().all()  # beyond what fp16 holds
    assert OftLinear.from_linear(built()[1], 8).weight.compute_dtype == torch.float32
    assert len(list(mergeable_layers(network))) == 1
