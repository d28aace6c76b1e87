"""OftLayers: what is rotated, how it is stored, and what is trained besides."""

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    MixtralConfig,
    MixtralForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from orthotrain.errors import ConfigurationError
from orthotrain.layers import OftConv2d, OftEmbedding, OftLinear, mergeable_layers
from orthotrain.models import CausalLM, PretrainedModel
from orthotrain.modules import OftLayers, PoetLayers

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 64,
}


def trained(network):
    return {n for n, p in network.named_parameters() if p.requires_grad and not n.endswith("generators")}


@pytest.mark.parametrize(("hidden", "inner"), [(256, 640), (576, 1536)])
def test_int8_takes_the_widths_of_the_shipped_recipes(hidden, inner):
    network = CausalLM({**SIZES, "hidden_size": hidden, "intermediate_size": inner})()
    OftLayers(storage="int8").apply_(network)
    groups = {layer.in_features: layer.weight.group_size for _, layer in mergeable_layers(network)}
    assert groups == {width: {256: 256, 640: 128, 576: 64, 1536: 256}[width] for width in (hidden, inner)}


@pytest.mark.parametrize("storage", ["int8", "nf4"])
def test_group_size_reaches_the_weights(storage):
    network = CausalLM(SIZES)()
    OftLayers(block_size=8, storage=storage, group_size=32).apply_(network)
    assert {layer.weight.group_size for _, layer in mergeable_layers(network)} == {32}


def test_group_sizes_that_mean_nothing_are_refused():
    with pytest.raises(ConfigurationError, match="group_size=32 with storage=None: only int8 and nf4 have groups"):
        OftLayers(group_size=32)
    with pytest.raises(ConfigurationError, match=r"q_proj \(64 x 64\): group_size=48 does not divide the 64 inputs"):
        OftLayers(block_size=8, storage="int8", group_size=48).apply_(CausalLM(SIZES)())


@pytest.mark.parametrize(
    ("network", "head"),
    [
        (lambda: BertForMaskedLM(BertConfig(**SIZES)), {"bert.pooler.dense", "classifier"}),
        (lambda: RobertaForMaskedLM(RobertaConfig(**SIZES)), {"classifier.dense", "classifier.out_proj"}),
    ],
)
def test_a_head_that_the_checkpoint_lacks_is_trained_and_not_rotated(network, head, tmp_path):
    network().save_pretrained(tmp_path / "base")
    build = PretrainedModel(str(tmp_path / "base"), "sequence_classification", options={"num_labels": 3})
    network = build()
    wrapped = OftLayers(block_size=8).apply_(network)
    assert trained(network) == {f"{name}.{kind}" for name in head for kind in ("weight", "bias")}
    assert wrapped and not head & set(wrapped)
    # once trained and saved it is a head like any other: frozen, unless a pattern asks for it
    network.save_pretrained(tmp_path / "whole")
    base = build()
    base.save_pretrained(tmp_path / "whole2")
    again = PretrainedModel(str(tmp_path / "whole2"), "sequence_classification")()
    OftLayers(block_size=8).apply_(again)
    assert not trained(again)


def test_a_resized_head_counts_as_new(tmp_path):
    BertForMaskedLM(BertConfig(**SIZES)).save_pretrained(tmp_path / "base")
    PretrainedModel(str(tmp_path / "base"), "sequence_classification", options={"num_labels": 3})().save_pretrained(
        tmp_path / "three"
    )
    options = {"num_labels": 5, "ignore_mismatched_sizes": True}
    network = PretrainedModel(str(tmp_path / "three"), "sequence_classification", options=options)()
    OftLayers(block_size=8).apply_(network)
    assert trained(network) == {"classifier.weight", "classifier.bias"}


def test_tied_heads_are_not_new(tmp_path):
    CausalLM({**SIZES, "tie_word_embeddings": True})().save_pretrained(tmp_path / "base")
    network = PretrainedModel(str(tmp_path / "base"))()
    OftLayers(block_size=8).apply_(network)
    assert network.fresh_parameters == [] and not trained(network)


def test_a_new_head_that_was_quantised_is_refused(tmp_path):
    BertForMaskedLM(BertConfig(**SIZES)).save_pretrained(tmp_path / "base")
    network = PretrainedModel(str(tmp_path / "base"), "sequence_classification", load_in_4bit=True)()
    with pytest.raises(ConfigurationError, match=r"bert.pooler.dense.weight is not in .* its layer is quantized"):
        OftLayers(block_size=8).apply_(network)


def test_experts_are_not_rotated_and_that_is_said():
    network = MixtralForCausalLM(MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4))
    with pytest.warns(UserWarning, match=r"2 parameters are stacks of matrices \(experts\), such as model.layers.0."):
        wrapped = OftLayers(block_size=8).apply_(network)
    assert any("q_proj" in name for name in wrapped) and not any("experts" in name for name in wrapped)
    assert not trained(network)


def test_poet_says_that_experts_are_trained_in_full(recwarn):
    network = MixtralForCausalLM(MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4))
    numbers = sum(p.numel() for name, p in network.named_parameters() if "experts" in name)
    PoetLayers(block_size=8, freeze=["*down_proj"]).apply_(network)
    left = sum(p.numel() for name, p in network.named_parameters() if "experts" in name and p.requires_grad)
    (told,) = [str(warning.message) for warning in recwarn if "experts" in str(warning.message)]
    assert f"not rotated: their {left:,} numbers are trained in full" in told and 0 < left < numbers


@pytest.mark.parametrize("layers", [OftLayers(block_size=8), PoetLayers(block_size=8), PoetLayers(fraction=0.5)])
def test_a_layer_that_is_too_narrow_is_told_about_exclude(layers):
    for width, fault in ((1, "a rotation needs 2 or more"), (4, "take an integer from 2 to 4")):
        network = nn.Sequential(nn.Linear(width, width))
        if width == 4 and getattr(layers, "fraction", None):
            continue
        with pytest.raises(ConfigurationError, match=rf"layer 0 \({width} x {width}\): .*{fault}.*exclude"):
            layers.apply_(network)


def test_convolutions_and_embeddings_of_three_dimensions_are_no_experts(recwarn):
    network = nn.Sequential(nn.Conv1d(4, 4, 3), nn.Linear(8, 8))
    network.position = nn.Parameter(torch.zeros(1, 4, 8))
    OftLayers(block_size=4).apply_(network)
    assert isinstance(network[1], OftLinear) and not [w for w in recwarn if "experts" in str(w.message)]


class Vision(nn.Module):
    """A convolution, an embedding and linear layers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 6, 3)
        self.positions = nn.Embedding(10, 16)
        self.mlp = nn.Sequential(nn.Linear(16, 16), nn.Embedding(4, 16))


def test_the_class_of_a_matched_module_decides_its_layer():
    network = Vision()
    layers = OftLayers(
        block_size=4, include=["conv", "pos*", "mlp*"], exclude=[], overrides={"conv": {"block_size": 8}}
    )
    assert layers.apply_(network) == ["conv", "positions", "mlp.0"]
    kinds = (type(network.conv), type(network.positions), type(network.mlp[0]), type(network.mlp[1]))
    # a pattern that matches a linear layer chooses linear layers alone
    assert kinds == (OftConv2d, OftEmbedding, OftLinear, nn.Embedding)
    assert (network.conv.rotation.block_size, network.positions.rotation.block_size) == (8, 4)
    assert OftLayers(block_size=4).apply_(Vision()) == ["mlp.0"]


def test_what_oft_has_no_use_for_is_refused_by_name():
    for storage in ("bf16", "residual"):
        with pytest.raises(ConfigurationError, match=f"storage='{storage}': the weight of an OFT layer does not"):
            OftLayers(storage=storage)
    with pytest.raises(ConfigurationError, match="layer conv: storage='nf4': only linear layers are quantized"):
        OftLayers(block_size=4, storage="nf4", include=["conv"], exclude=[]).apply_(Vision())
    with pytest.raises(ConfigurationError, match="overrides '.': train cannot differ by layer"):
        OftLayers(overrides={"*": {"train": ["*"]}})
    with pytest.raises(ConfigurationError, match="overrides: 'blocksize' is no setting"):
        OftLayers(overrides={"*": {"blocksize": 8}})
