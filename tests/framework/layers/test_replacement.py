"""Finding and replacing linear layers: what matches, what is refused, and that nothing is half done."""

import pytest
import torch
from torch import nn

from orthotrain.errors import ConfigurationError
from orthotrain.layers import PoetLinear, replace_linears, select_linears, unwrap_mergeables
from orthotrain.models import CausalLM


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)) for _ in range(2))
        self.lm_head = nn.Linear(8, 10, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.lm_head(x)


def factory(linear):
    return PoetLinear.from_linear(linear, 4)


def test_replaces_what_matches_and_unwraps_again(randomize):
    net, ids = Net(), torch.arange(10)
    expected = net(ids)
    names = replace_linears(net, ["layers.*"], ["layers.1.2"], factory)
    assert names == ["layers.0.0", "layers.0.2", "layers.1.0"]
    torch.testing.assert_close(net(ids), expected, rtol=1e-5, atol=1e-6)
    randomize(net)
    rotated = net(ids)
    assert unwrap_mergeables(net) == names
    assert not any(isinstance(module, PoetLinear) for module in net.modules())
    torch.testing.assert_close(net(ids), rotated, rtol=1e-4, atol=1e-5)
    assert set(net.state_dict()) == set(Net().state_dict())


def test_a_shared_module_is_replaced_once_and_stays_shared():
    net = Net()
    net.again = net.layers[0][0]
    assert replace_linears(net, ["layers.*"], (), factory) == ["layers.0.0", "layers.0.2", "layers.1.0", "layers.1.2"]
    assert net.again is net.layers[0][0] and isinstance(net.again, PoetLinear)


def test_tied_weights_are_refused_by_name():
    net = Net()
    net.lm_head.weight = net.embed.weight
    with pytest.raises(ConfigurationError, match=r"lm_head.weight is tied to embed.weight.*'lm_head' to exclude"):
        replace_linears(net, ["*"], (), factory)
    assert "lm_head" not in select_linears(net, ["*"], ["lm_head"])


@pytest.mark.parametrize("include", [["*"], ["layers.0.self_attn.out_proj"]])
def test_a_layer_whose_weight_is_read_past_it_is_refused_by_name(include):
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 1)
    with pytest.raises(ConfigurationError, match=r"layers.0.self_attn.out_proj is never called: nn.MultiheadAttention"):
        replace_linears(encoder, include, (), factory)
    assert not any(isinstance(module, PoetLinear) for module in encoder.modules())


def test_the_fast_path_of_an_encoder_layer_is_refused_and_without_it_the_rotations_count(randomize):
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 1).eval()
    with pytest.raises(ConfigurationError, match=r"layers.0.linear1 is not called in evaluation.*set_fastpath_enabled"):
        replace_linears(encoder, ["*"], ["*out_proj"], factory)
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        x = torch.randn(2, 3, 8)
        with torch.no_grad():
            expected = encoder(x)
            assert replace_linears(encoder, ["*"], ["*out_proj"], factory) == ["layers.0.linear1", "layers.0.linear2"]
            torch.testing.assert_close(encoder(x), expected, rtol=1e-5, atol=1e-5)
            randomize(encoder)
            assert (encoder(x) - expected).abs().max() > 1e-3
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_subclass_that_may_compute_something_else_is_refused_by_name():
    net = nn.Sequential(nn.Linear(8, 8), Scaled(8, 8))
    with pytest.raises(ConfigurationError, match=r"1 is a Scaled, a subclass of nn.Linear.*add '1' to exclude"):
        replace_linears(net, ["*"], (), factory)
    assert type(net[0]) is nn.Linear
    assert replace_linears(net, ["*"], ["1"], factory) == ["0"]
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    with pytest.raises(ConfigurationError, match="0 is a ParametrizedLinear"):
        replace_linears(net, ["*"], (), factory)


def test_the_transposed_linears_of_gpt2_are_refused_with_the_cause():
    net = CausalLM({"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 64}, "gpt2")()
    with pytest.raises(ConfigurationError, match=r"transformer.h.0.attn.c_attn is a Conv1D of transformers .*GPT-2"):
        select_linears(net, ["*"], ["lm_head"])
    with pytest.raises(ConfigurationError, match="mlp.c_fc is a Conv1D"):
        select_linears(net, ["*c_fc"])
    others = ["*c_attn", "*c_proj", "*c_fc"]
    with pytest.raises(ConfigurationError, match="leaves no linear layer"):
        select_linears(net, ["*"], ["lm_head", *others])


def test_an_error_names_the_layer_and_leaves_the_model_as_it_was():
    net = Net()
    with pytest.raises(ConfigurationError, match=r"layer layers.0.0 \(12 x 8\): block_size=9 .*from 2 to 8"):
        replace_linears(net, ["*"], (), lambda linear: PoetLinear.from_linear(linear, 9))
    assert not any(isinstance(module, PoetLinear) for module in net.modules())


@pytest.mark.parametrize(
    ("include", "exclude", "message"),
    [
        (["*mlp*"], [], r"include pattern '\*mlp\*' matches no linear layer; the model has 5"),
        (["layers.*", "nothing"], [], "include pattern 'nothing' matches no linear layer"),
        (["layers.*"], ["*"], "leaves no linear layer"),
    ],
)
def test_patterns_that_select_nothing_are_errors(include, exclude, message):
    with pytest.raises(ConfigurationError, match=message):
        select_linears(Net(), include, exclude)


def test_a_model_without_linear_layers_says_so():
    with pytest.raises(ConfigurationError, match="the model has no linear layer"):
        select_linears(nn.Sequential(nn.ReLU()), ["*"])
