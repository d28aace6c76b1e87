"""Adapters as plain tensors, and several of them on one network."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from orthotrain.adapters import AdapterSet, adapter_state, load_adapter, load_adapter_state, oft_layers, unload
from orthotrain.errors import ConfigurationError, TrainingDiverged
from orthotrain.layers import FrozenLinear, OftConv2d, OftEmbedding, OftLinear, OftSettings, PoetLinear
from orthotrain.modules import OftLayers


class Network(nn.Module):
    """One layer of each kind, and a norm."""

    def __init__(self):
        super().__init__()
        self.embed = OftEmbedding.from_settings(nn.Embedding(10, 16), OftSettings(4))
        self.conv = OftConv2d.from_settings(nn.Conv2d(4, 8, 3, padding=1), OftSettings(2))
        self.norm = nn.LayerNorm(32).requires_grad_(False)
        self.head = OftLinear.from_linear(nn.Linear(32, 5), 8, train_bias=False)

    def forward(self, index):
        image = self.embed(index).view(-1, 4, 2, 2)
        return self.head(self.norm(self.conv(image).flatten(1)))


INDEX = torch.arange(10)


@pytest.fixture
def network():
    return Network()


def trained(network, seed):
    """What the network holds after a training of some kind."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value + 0.1 * torch.randn(value.shape, generator=generator)
        for name, value in adapter_state(network).items()
    }


def outputs(network):
    with torch.no_grad():
        return network(INDEX).clone()


def test_an_adapter_is_what_is_trained_and_comes_back(network):
    network.norm.requires_grad_(True)
    state = adapter_state(network)
    assert list(state) == [
        "embed.rotation_out.generators",
        "conv.rotation_in.generators",
        "norm.weight",
        "norm.bias",
        "head.rotation_in.generators",
    ]
    other, changed = copy.deepcopy(network), trained(network, 1)
    load_adapter_state(network, changed)
    assert all(torch.equal(value, changed[name]) for name, value in adapter_state(network).items())
    assert not torch.equal(outputs(network), outputs(other))
    load_adapter_state(network, state)
    assert torch.equal(outputs(network), outputs(other))


def test_a_copy_is_a_copy(network):
    state = adapter_state(network)
    with torch.no_grad():
        network.head.rotation_in.generators.fill_(1.0)
    assert not state["head.rotation_in.generators"].any()


def test_what_does_not_fit_is_refused_and_nothing_is_written(network):
    good = trained(network, 1)
    missing = {name: value for name, value in good.items() if not name.startswith("head")}
    for bad, message in [
        (missing, r"1 tensors are not in it \(head.rotation_in.generators\)"),
        ({**good, "tail.weight": torch.ones(2)}, r"not in the model \(tail.weight\)"),
        ({**good, "head.rotation_in.generators": torch.ones(2, 28)}, r"head.rotation_in.generators is \(2, 28\) there"),
        ({"a": torch.ones(1)}, "none of the network's 3 trained parameters"),
    ]:
        with pytest.raises(ConfigurationError, match=message):
            load_adapter_state(network, bad)
        assert not any(value.any() for value in adapter_state(network).values())
    with pytest.raises(ConfigurationError, match="head.rotation_in"):
        load_adapter_state(network, {"head.rotation_in.generators": torch.ones(1)}, strict=False)
    load_adapter_state(network, {**missing, "tail.weight": torch.ones(2)}, strict=False)
    state = adapter_state(network)
    assert not state["head.rotation_in.generators"].any() and state["conv.rotation_in.generators"].any()


def test_networks_without_an_adapter_are_refused():
    with pytest.raises(ConfigurationError, match="no OFT layer"):
        adapter_state(nn.Linear(4, 4))
    with pytest.raises(ConfigurationError, match="1 is a PoetLinear"):
        adapter_state(nn.Sequential(nn.ReLU(), PoetLinear.from_linear(nn.Linear(8, 8), block_size=4)))


def test_switching_keeps_what_each_adapter_learned(network):
    base, adapters = outputs(network), AdapterSet(network, "a")
    load_adapter_state(network, trained(network, 1))
    a = outputs(network)
    adapters.add("b")
    adapters.switch("b")
    assert adapters.active == "b" and torch.equal(outputs(network), base)
    load_adapter_state(network, trained(network, 2))
    b = outputs(network)
    adapters.switch("a")
    assert torch.equal(outputs(network), a)
    adapters.add("c", adapters.state("b"))
    adapters.switch("c")
    assert torch.equal(outputs(network), b)
    adapters.disable()
    assert torch.equal(outputs(network), base)
    adapters.enable()
    assert torch.equal(outputs(network), b)
    with pytest.raises(RuntimeError, match="stopped"), adapters.disable():
        assert torch.equal(outputs(network), base)
        raise RuntimeError("stopped")
    assert torch.equal(outputs(network), b)
    adapters.remove("b")
    assert adapters.names == ["a", "c"]


def test_after_a_merge_the_others_are_refused_unless_forced(network):
    adapters = AdapterSet(network, "a")
    load_adapter_state(network, trained(network, 1))
    a = outputs(network)
    adapters.add("b", trained(network, 2))
    adapters.switch("b")
    adapters.merge("a")
    assert adapters.names == ["b"] and adapters.merged == ["a"] and adapters.active is None
    torch.testing.assert_close(outputs(network), a, atol=1e-5, rtol=1e-5)
    assert not any(value.any() for value in adapter_state(network).values())
    with pytest.raises(ConfigurationError, match="'b' was made for the weights before a was merged"):
        adapters.switch("b")
    with pytest.raises(ConfigurationError, match="'b' was made for the weights"):
        adapters.merge("b")
    with pytest.raises(ConfigurationError, match="'a' was merged and removed; there are b"):
        adapters.switch("a")
    adapters.add("new")
    adapters.switch("new")
    adapters.switch("b", force=True)
    assert not torch.allclose(outputs(network), a, atol=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), 1e30])
def test_an_adapter_that_is_not_finite_is_not_merged_at_all(network, bad):
    adapters = AdapterSet(network, "a")
    load_adapter_state(network, trained(network, 1))
    for name in ("b", "a"):
        if name == "b":
            adapters.add("b", {k: v.fill_(bad) if "head" in k else v for k, v in trained(network, 2).items()})
        else:
            network.head.rotation_in.generators.data[0, 0] = bad
        before = {key: value.clone() for key, value in network.state_dict().items()}
        with pytest.raises(ConfigurationError, match="head"):
            adapters.merge(name)
        torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0, equal_nan=True)
        assert adapters.active == "a" and adapters.names == ["a", "b"]
    with pytest.raises(TrainingDiverged, match="the rotation of a Linear holds NaN, infinite or huge values"):
        network.head.merge_()
    assert bool(torch.isfinite(network.head.weight.values).all())


def test_what_is_trained_after_a_merge_is_not_lost_on_the_next_switch(network):
    adapters = AdapterSet(network, "a")
    load_adapter_state(network, trained(network, 1))
    adapters.merge("a")
    adapters.add("b")
    adapters.switch("b")  # nothing was trained in between
    adapters.merge("b")
    adapters.add("c")
    load_adapter_state(network, trained(network, 2))
    learned = outputs(network)
    for call in (lambda: adapters.switch("c"), lambda: adapters.merge("c")):
        with pytest.raises(ConfigurationError, match=r"trained after 'b' was merged.*keep them with add\(NAME"):
            call()
        assert adapters.active is None and torch.equal(outputs(network), learned)
    adapters.add("kept", adapter_state(network))
    adapters.switch("c")
    assert not torch.equal(outputs(network), learned)
    adapters.switch("kept")
    assert torch.equal(outputs(network), learned)
    adapters.merge("kept")
    load_adapter_state(network, trained(network, 3))
    adapters.switch("c", force=True)
    assert adapters.active == "c" and not network.head.rotation_in.generators.any()


@pytest.mark.parametrize("storage", ["nf4", "int8", None])
def test_a_merge_reports_what_requantising_loses(storage, caplog):
    net = nn.Sequential(*(OftLinear.from_linear(nn.Linear(64, 64), 8, storage=storage) for _ in range(2)))
    adapters = AdapterSet(net, "a")
    load_adapter_state(net, trained(net, 1))
    exact = [layer.merged_weight() for layer in net]
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        errors = adapters.merge("a")
    if storage is None:
        assert errors == {} and "quantized again" not in caplog.text
        return
    for place, layer in enumerate(net):
        lost = (layer.weight.dequantize() - exact[place]).norm() / exact[place].norm()
        assert errors[str(place)] == pytest.approx(float(lost), rel=1e-3) and lost > 1e-3
    assert (
        f"2 weights were quantized again, with a mean relative error of {sum(errors.values()) / 2:.2%}" in caplog.text
    )
    assert f"at most {max(errors.values()):.2%} in" in caplog.text


def test_an_adapter_file_is_loaded_or_refused_as_a_whole(network, tmp_path):
    state = trained(network, 1)
    save_file(state, tmp_path / "adapter.safetensors")
    load_adapter(network, tmp_path)
    assert all(torch.equal(value, state[name]) for name, value in adapter_state(network).items())
    whole = (tmp_path / "adapter.safetensors").read_bytes()
    for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "short.safetensors").write_bytes(whole[:length])
        with pytest.raises(ConfigurationError, match=r"short.safetensors' is truncated or is not a safetensors file"):
            load_adapter(network, tmp_path / "short.safetensors")
    torch.save(state, tmp_path / "pickled.safetensors")
    with pytest.raises(ConfigurationError, match=r"pickled.safetensors' is truncated or is not a safetensors file"):
        load_adapter(network, tmp_path / "pickled.safetensors")
    with pytest.raises(ConfigurationError, match=r"gone.safetensors' is not a file"):
        load_adapter(network, tmp_path / "gone.safetensors")
    save_file({**state, "head.rotation_in.generators": torch.ones(2, 28)}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigurationError, match=r"other.safetensors': .*head.rotation_in.generators is \(2, 28\)"):
        load_adapter(network, tmp_path / "other.safetensors")
    assert all(torch.equal(value, state[name]) for name, value in adapter_state(network).items())


def test_names_and_states_are_checked(network):
    adapters = AdapterSet(network, "a")
    adapters.add("b")
    for call, message in [
        (lambda: adapters.switch("d"), "there is no adapter 'd'; there are a, b"),
        (lambda: adapters.merge("d"), "there is no adapter 'd'; there are a, b"),
        (lambda: adapters.state("d"), "there is no adapter 'd'; there are a, b"),
        (lambda: adapters.add("a"), "'a' exists already; there are a, b"),
        (lambda: adapters.remove("a"), "'a' is active"),
        (lambda: adapters.add("d", {"x": torch.ones(1)}), "'d' does not fit the network"),
    ]:
        with pytest.raises(ConfigurationError, match=message):
            call()
    adapters.disable()
    with pytest.raises(ConfigurationError, match=r"call enable\(\) before merging adapter 'a'"):
        adapters.merge("a")


def test_disabling_is_refused_where_it_would_not_give_the_base(network):
    network.norm.requires_grad_(True)
    adapters = AdapterSet(network)
    with pytest.raises(ConfigurationError, match=r"norm.weight is trained besides the generators \(2 parameters\)"):
        adapters.disable()
    load_adapter_state(network, trained(network, 3))
    adapters.add("fresh")
    norm = network.norm.weight.detach().clone()
    adapters.switch("fresh")
    assert torch.equal(network.norm.weight, norm) and not network.head.rotation_in.generators.any()


def test_what_code_around_a_layer_reads(network):
    conv, embed, head = network.conv, network.embed, network.head
    assert (conv.in_channels, conv.out_channels, conv.kernel_size, conv.groups) == (4, 8, (3, 3), 1)
    assert (embed.num_embeddings, embed.embedding_dim, embed.padding_idx) == (10, 16, None)
    assert (head.in_features, head.out_features) == (32, 5) and conv.bias is conv.conv.bias
    for layer, shape in ((conv, (8, 4, 3, 3)), (embed, (10, 16)), (head, (5, 32))):
        assert layer.weight.shape == shape and layer.weight.dtype == torch.float32
        assert layer.weight.device == torch.device("cpu")
        assert layer.weight.data.device == torch.device("cpu")
        with pytest.raises(ConfigurationError, match=r"^cat was given the frozen weight of a layer, which lacks the"):
            torch.cat([layer.weight.data, layer.weight.data])  # fuse_qkv_projections of diffusers
        with pytest.raises(ConfigurationError, match="^linear was given the frozen weight"):
            nn.functional.linear(torch.ones(1, 32), layer.weight)


@pytest.mark.parametrize("storage", [None, "int8", "nf4"])
def test_unloading_gives_the_weights_of_the_base_back(storage):
    plain = nn.Sequential(nn.Embedding(10, 64), Conv1D(64, 64), nn.Linear(64, 64), nn.Linear(64, 8, bias=False))
    base, network = copy.deepcopy(plain), copy.deepcopy(plain)
    OftLayers(include=["1", "2", "3"], exclude=[], block_size=8, storage=storage).apply_(network)
    if storage is None:
        OftLayers(include=["0"], exclude=[], block_size=8).apply_(network)
    untrained = outputs(network)
    load_adapter_state(network, trained(network, 1))
    assert not torch.allclose(outputs(network), untrained, atol=1e-3)
    network.eval()
    assert unload(network) is network and not network[2].training
    assert torch.equal(outputs(network), untrained)
    assert not any(parameter.requires_grad for parameter in network.parameters())
    if storage is None:
        assert [type(layer) for layer in network] == [nn.Embedding, Conv1D, nn.Linear, nn.Linear]
        assert all(torch.equal(value, base.state_dict()[name]) for name, value in network.state_dict().items())
    else:
        assert [type(layer) for layer in network] == [nn.Embedding] + [FrozenLinear] * 3
    with pytest.raises(ConfigurationError, match="no OFT layer"):
        unload(network)


def test_unloading_is_refused_where_it_would_not_give_the_base(network):
    network.norm.requires_grad_(True)
    with pytest.raises(ConfigurationError, match="norm.weight is trained besides the generators"):
        unload(network)
    with pytest.raises(ConfigurationError, match="is an OFT layer itself"):
        unload(network.head)
    assert isinstance(network.head, OftLinear)


def test_each_row_has_an_adapter_of_its_own(network):
    adapters = AdapterSet(network, "a")
    load_adapter_state(network, trained(network, 1))
    adapters.add("b", trained(network, 2))
    expected = {"a": outputs(network)}
    with adapters.disable():
        expected[None] = outputs(network)
    adapters.switch("b")
    expected["b"] = outputs(network)
    names = ["b", None, "a", "a", "b", None, None, "b", "a", "b"]
    with adapters.rows(names):
        found = outputs(network)
        with pytest.raises(ConfigurationError, match="leave their with block"):
            network.head.merge_()
        with pytest.raises(ConfigurationError, match=r"leave their with block before merging 'b'"):
            adapters.merge("b")
        with pytest.raises(ConfigurationError, match=r"layer embed: its input \(3, 16\) does not have the 10 rows"):
            network(INDEX[:3])
    for row, name in enumerate(names):
        torch.testing.assert_close(found[row], expected[name][row])
    assert torch.equal(outputs(network), expected["b"])
    with adapters.rows(["a"] * 10):
        torch.testing.assert_close(outputs(network), expected["a"])
    with pytest.raises(ConfigurationError, match="there is no adapter 'c'; there are a, b"):
        adapters.rows(["a", "c"])
    network.norm.requires_grad_(True)
    with pytest.raises(ConfigurationError, match="norm.weight is trained besides the generators"):
        adapters.rows(["a"] * 10)


def test_adapters_act_one_after_the_other():
    layer = OftLinear.from_linear(nn.Linear(16, 6), 4, "cayley", rotation_dtype="float32", block_share=True)
    network, x = nn.Sequential(layer), torch.randn(3, 5, 16)
    adapters = AdapterSet(network, "a")
    load_adapter_state(network, trained(network, 1))
    adapters.add("b", trained(network, 2))
    rotations = []
    for name in ("a", "b"):
        adapters.switch(name)
        rotations.append(torch.eye(16) + torch.block_diag(*layer.displacements()[0].detach()))
    expected = x @ rotations[0] @ rotations[1] @ layer.weight.values.T + layer.bias
    with adapters.together("a", "b"):
        with torch.inference_mode():
            torch.testing.assert_close(network(x), expected)
        network(x.clone().requires_grad_()).sum().backward()
        assert layer.rotation_in.generators.grad is None
    with adapters.together("b", "a"):
        assert not torch.allclose(network(x), expected, atol=1e-3)
    with adapters.together("a", "b"), adapters.disable():
        torch.testing.assert_close(network(x), x @ layer.weight.values.T + layer.bias)
    with pytest.raises(ConfigurationError, match="give the names of the adapters"):
        adapters.together()


def test_merges_are_undone_in_turn(network):
    network.norm.requires_grad_(True)
    start = copy.deepcopy(network.state_dict())
    adapters = AdapterSet(network, "a")
    load_adapter_state(network, {key: 3 * value for key, value in trained(network, 1).items()})  # far from orthogonal
    a = outputs(network)
    adapters.add("other", trained(network, 2))
    with pytest.raises(ConfigurationError, match="no adapter is merged; there are a, other"):
        adapters.unmerge()
    adapters.merge("a")
    adapters.add("b", trained(network, 3))
    adapters.merge("b")
    b = outputs(network)
    adapters.add("since")
    adapters.switch("since")
    assert adapters.unmerge() == "b" and adapters.active == "b" and adapters.merged == ["a"]
    torch.testing.assert_close(outputs(network), b, rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigurationError, match="'since' was made for the weights with b merged"):
        adapters.switch("since")
    adapters.add("a")
    with pytest.raises(ConfigurationError, match="there is a new adapter 'a'"):
        adapters.unmerge()
    adapters.remove("a")
    assert adapters.unmerge() == "a" and adapters.merged == []
    torch.testing.assert_close(outputs(network), a, rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigurationError, match="'b' was made for the weights with a merged"):
        adapters.switch("b")
    adapters.switch("other")
    for name, value in network.state_dict().items():
        if "generators" not in name and "norm" not in name:
            torch.testing.assert_close(value, start[name], rtol=1e-5, atol=1e-6)


def test_a_merge_that_cannot_be_undone_is_left_as_it_is(network):
    quantized = nn.Sequential(
        OftLinear.from_linear(nn.Linear(64, 64), 8), OftLinear.from_linear(nn.Linear(64, 64), 8, storage="int8")
    )
    for net, message, since in [
        (quantized, "1 is stored in int8, the merge has quantized it again", None),
        (network, "the network was trained after 'a' was merged", trained(network, 3)),
    ]:
        adapters = AdapterSet(net, "a")
        load_adapter_state(net, trained(net, 1))
        adapters.merge("a")
        if since is not None:
            load_adapter_state(net, since)
        before = copy.deepcopy(net.state_dict())
        with pytest.raises(ConfigurationError, match=message):
            adapters.unmerge()
        torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
        assert adapters.merged == ["a"] and adapters.active is None
    with pytest.raises(ConfigurationError, match="its weight is stored in int8"):
        quantized[1].unmerge_()
    adapters.unmerge(force=True)


def test_adapters_rotate_different_layers(network):
    adapters = AdapterSet(network, "all")
    load_adapter_state(network, trained(network, 1))
    everywhere, generators = (
        outputs(network),
        {name: layer.rotation.generators for name, layer in oft_layers(network).items()},
    )
    adapters.add("some", layers=["head", "em*"])
    adapters.switch("some")
    assert [name for name, p in generators.items() if p.requires_grad] == ["embed", "head"]
    network(INDEX).square().sum().backward()
    torch.optim.SGD(network.parameters(), 0.1).step()
    some, state = outputs(network), adapters.state("some")
    assert list(state) == ["embed.rotation_out.generators", "head.rotation_in.generators"]
    assert all(value.any() for value in state.values()) and not generators["conv"].any()
    adapters.switch("all")
    assert torch.equal(outputs(network), everywhere) and all(p.requires_grad for p in generators.values())
    adapters.add("again", state, layers=["embed", "head"])
    with adapters.rows(["again"] * 5 + ["all"] * 5):
        torch.testing.assert_close(outputs(network), torch.cat([some[:5], everywhere[5:]]))
    adapters.merge("again")
    assert all(p.requires_grad for p in generators.values())
    adapters.unmerge()
    assert not generators["conv"].requires_grad and list(adapters.state("again")) == list(state)
    for message, arguments in [
        ("'tail' matches no OFT layer; there are embed, conv, head", {"layers": ["tail"]}),
        (r"not in the model \(embed.rotation_out.generators\)", {"state": state, "layers": ["head"]}),
        (r"1 tensors are not in it \(conv.rotation_in.generators\)", {"state": state}),
    ]:
        with pytest.raises(ConfigurationError, match=message):
            adapters.add("bad", **arguments)
    assert adapters.names == ["all", "some", "again"]


def test_a_trained_bias_belongs_to_its_adapter():
    network = nn.Sequential(OftLinear.from_linear(nn.Linear(16, 16), 4, train_bias=True))
    adapters, x = AdapterSet(network, "a"), torch.randn(3, 16)
    load_adapter_state(network, trained(network, 1))
    a = network(x)
    adapters.add("b", trained(network, 2))
    adapters.switch("b")
    assert not torch.allclose(network(x), a, atol=1e-3)
    adapters.switch("a")
    assert torch.equal(network(x), a)
    for refused in (adapters.disable, lambda: adapters.together("a"), lambda: adapters.rows(["a"] * 3)):
        with pytest.raises(ConfigurationError, match="0.bias is trained besides the generators"):
            refused()
    adapters.merge("a")
    adapters.switch("b", force=True)
    adapters.unmerge()
    torch.testing.assert_close(network(x), a)
