"""Finding and replacing linear layers: what matches, what is refused, and that nothing is half done."""

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from transformers import GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from orthotrain.errors import ConfigurationError
from orthotrain.export import export_huggingface
from orthotrain.layers import (
    OftEmbedding,
    OftLinear,
    OftSettings,
    PoetLinear,
    StepwiseLinear,
    mergeable_layers,
    replace_linears,
    select_linears,
    unwrap_mergeables,
)
from orthotrain.layers.folding import fold_rotations
from orthotrain.models import CausalLM
from orthotrain.modules import OftLayers, PoetLayers


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


GPT2 = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0}


@pytest.mark.parametrize(
    "layers",
    [OftLayers(block_size=8), OftLayers(block_size=8, storage="int8", group_size=32),
     PoetLayers(block_size=8, init="keep"), PoetLayers(block_size=8, init="keep", stepwise=True)],
)  # fmt: skip
def test_the_transposed_linears_of_gpt2_are_wrapped_and_come_back(randomize, tmp_path, layers):
    net = CausalLM(GPT2, "gpt2")().eval()
    ids, keys = torch.arange(12)[None], net.state_dict().keys()
    before = net(ids).logits
    names = layers.apply_(net)
    assert [name.split(".", 3)[3] for name in names] == ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    quantized = layers.storage == "int8"
    torch.testing.assert_close(net(ids).logits, before, rtol=1e-5, atol=2e-2 if quantized else 1e-5)
    randomize(net, 0.1)
    if getattr(layers, "stepwise", None):
        fold_rotations(dict(mergeable_layers(net)))
    wrapped = net(ids).logits
    assert (wrapped - before).abs().max() > 1e-3
    state = net.state_dict()
    export_huggingface(net, tmp_path / "out")
    assert net.state_dict().keys() == keys and type(net.transformer.h[0].mlp.c_fc) is Conv1D
    for network in (net, GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()):
        torch.testing.assert_close(network(ids).logits, wrapped, rtol=1e-4, atol=1e-5)
    again = CausalLM(GPT2, "gpt2")().eval()
    layers.apply_(again)
    again.load_state_dict(state)
    assert torch.equal(again(ids).logits, wrapped)


def test_a_subclass_whose_forward_is_that_of_a_linear_layer_is_wrapped():
    class Own(nn.Linear):
        def forward(self, x):
            y = x @ self.weight.T
            return y if self.bias is None else y + self.bias

    class Noisy(Own):
        def forward(self, x):
            return super().forward(x) + torch.rand(()) * self.training

    class Tall(nn.Linear):
        pass

    for device in ("cpu", "meta"):
        with torch.device(device):
            net = nn.Sequential(Own(8, 8), Own(8, 8, bias=False), Tall(8, 8), Noisy(8, 8))
        with pytest.raises(ConfigurationError, match="3 is a Noisy, a subclass of nn.Linear"):
            select_linears(net)
        assert list(select_linears(net, exclude=["3"])) == ["0", "1", "2"]
    net = nn.Sequential(nn.utils.weight_norm(nn.Linear(8, 8)), nn.LazyLinear(8))
    for name, why in (("0", "has the forward pre-hook WeightNorm"), ("1", "is a LazyLinear")):
        with pytest.raises(ConfigurationError, match=f"{name} {why}"):
            select_linears(net, [name])


class Clamped(nn.Linear):
    def forward(self, x):
        return super().forward(x.clamp(-10, 10))


class CentersWide(nn.Linear):
    def forward(self, x):
        return super().forward(x - x.mean(-1, keepdim=True) if self.in_features > 200 and self.training else x)


class Tall(nn.Linear):
    def forward(self, x):
        return super().forward(x) + (self.out_features > 200)


@pytest.mark.parametrize(
    "layer", [Clamped(8, 8), CentersWide(256, 8), Tall(8, 256)], ids=lambda layer: type(layer).__name__
)
def test_a_subclass_that_computes_something_else_for_some_inputs_or_widths_is_refused(layer):
    with pytest.raises(ConfigurationError, match=f"0 is a {type(layer).__name__}, .*add '0' to exclude"):
        select_linears(nn.Sequential(layer))
    for direct in (PoetLinear, OftLinear, StepwiseLinear):
        with pytest.raises(ConfigurationError, match=f"the layer is a {type(layer).__name__}"):
            direct.from_linear(layer, block_size=4)


def _patched(linear):
    forward = linear.forward
    linear.forward = lambda x: 2 * forward(x)


def double(*_):
    return None


@pytest.mark.parametrize(
    ("hook", "message"),
    [
        (lambda linear: linear.register_forward_hook(double), "the forward hook double"),
        (lambda linear: linear.register_forward_pre_hook(double), "the forward pre-hook double"),
        (lambda linear: linear.register_full_backward_hook(double), "the backward hook double"),
        (lambda linear: linear.register_full_backward_pre_hook(double), "the backward pre-hook double"),
        (_patched, "a forward of its own, set on the instance"),
    ],
)  # fmt: skip
def test_a_layer_with_a_hook_is_refused_by_name(hook, message):
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    hook(net[1])
    with pytest.raises(ConfigurationError, match=f"^1 has {message}, which .*: remove it, or add '1' to exclude$"):
        replace_linears(net, factory=factory)
    assert replace_linears(net, exclude=["1"], factory=factory) == ["0"]
    for direct in (PoetLinear, OftLinear, StepwiseLinear):
        with pytest.raises(ConfigurationError, match=f"the layer has {message}"):
            direct.from_linear(net[1], block_size=4)


def test_what_only_places_or_was_undone_is_no_hook():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    add_hook_to_module(net[0], AlignDevicesHook("cpu", io_same_device=True))
    net[1].forward = net[1].forward
    assert list(select_linears(net)) == ["0", "1"]
    table = add_hook_to_module(nn.Embedding(6, 8), AlignDevicesHook("cpu"))
    wrapped, index = OftEmbedding.from_settings(table, OftSettings(block_size=4)), torch.arange(6)
    nn.init.normal_(wrapped.rotation.generators)
    torch.testing.assert_close(wrapped.unwrap()(index), wrapped(index))
    _patched(net[1])
    # a patched layer stays one below the hook, and weights that are offloaded are not there to be wrapped
    add_hook_to_module(net[1], AlignDevicesHook("cpu"))
    net[0]._hf_hook.offload = True
    for name in ("0", "1"):
        with pytest.raises(ConfigurationError, match=f"{name} has a forward of its own"):
            select_linears(net, [name])


def test_a_plain_name_is_the_last_part_of_names():
    net = CausalLM({"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2})()
    found = select_linears(net, ["q_proj", "mlp.up_proj"])
    assert [name.split(".", 3)[3] for name in found] == 2 * ["self_attn.q_proj", "mlp.up_proj"]
    assert (
        len(select_linears(net, ["all-linear"])) == 14 and len(select_linears(net, ["all-linear"], ["down_proj"])) == 12
    )
    assert list(select_linears(net, ["lm_head"])) == ["lm_head"]
    with pytest.raises(ConfigurationError, match="include pattern 'proj' matches no linear layer"):
        select_linears(net, ["proj"])
    with pytest.raises(ConfigurationError, match="exclude pattern 'mlp' matches no module"):
        OftLayers(block_size=8, exclude=["mlp"]).apply_(net)
    layers = OftLayers(block_size=8, include=["v_proj", "up_proj"], overrides={"v_proj": {"block_size": 16}})
    layers.apply_(net)
    sizes = {name.split(".")[-1]: layer.rotation_in.block_size for name, layer in mergeable_layers(net)}
    assert sizes == {"v_proj": 16, "up_proj": 8}
    assert OftLayers(include="all-linear").include == PoetLayers(include="all-linear").include == ["all-linear"]
    # a full name comes before the last part of another
    nested = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8)))
    assert list(select_linears(nested, ["0"])) == ["0"]
    image = nn.Sequential(nn.Sequential(nn.Conv2d(8, 8, 3)), nn.Linear(8, 8))
    image.add_module("table", nn.ModuleDict({"words": nn.Embedding(4, 8)}))
    assert OftLayers(block_size=8, include=["0", "words"]).apply_(image) == ["0.0", "table.words"]


def test_an_error_names_the_layer_and_leaves_the_model_as_it_was():
    net = Net()
    with pytest.raises(ConfigurationError, match=r"layer layers.0.0 \(12 x 8\): block_size=9 .*from 2 to 8"):
        replace_linears(net, ["*"], (), lambda linear: PoetLinear.from_linear(linear, 9))
    assert not any(isinstance(module, PoetLinear) for module in net.modules())


@pytest.mark.parametrize("kind", [PoetLayers, OftLayers])
def test_layers_that_do_not_fit_are_refused_before_any_weight_is_drawn_or_released(kind):
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(8, 8))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ConfigurationError, match=r"layer 1 \(8 x 8\): block_size=16"):
        kind(block_size=16, include=["*"], exclude=[]).apply_(net)
    after = net.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


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
