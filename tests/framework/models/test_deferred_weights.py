"""Networks that are built without the weights that a method draws anew: the same values, a layer's memory at a time."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from orthotrain.errors import ConfigurationError
from orthotrain.models import CausalLM
from orthotrain.models.deferred_weights import allocate, build_without_weights
from orthotrain.modules import OftLayers, PoetLayers, PoetModule

TYPES = {
    "llama": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "mixtral": {"num_key_value_heads": 2},
    "gemma2": {"num_key_value_heads": 2},
    "mamba": {},
}


def linears(network):
    return [n for n, m in network.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in n]


@pytest.mark.parametrize("model_type", TYPES)
def test_all_other_values_are_those_of_a_plain_build(model_type, tiny_llama):
    known = CausalLM(model_type=model_type)._configuration().to_dict() | TYPES[model_type]
    config = {name: value for name, value in tiny_llama.items() if name in known} | TYPES[model_type]
    builder = CausalLM(config, model_type)
    torch.manual_seed(3)
    plain, following = builder().state_dict(), torch.rand(4)
    torch.manual_seed(3)
    network = builder(without=linears)
    assert torch.equal(torch.rand(4), following)
    found = network.state_dict()
    late = {name for name, value in found.items() if value.is_meta}
    assert late == {f"{name}.weight" for name in linears(network)}
    assert not any(buffer.is_meta for buffer in network.buffers())
    assert all(torch.equal(found[name], plain[name]) for name in plain if name not in late)


class Tied(nn.Module):
    """A head that is tied to the embedding, and a layer under two names."""

    def __init__(self):
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.again, self.head.weight = self.body, self.embed.weight


def test_tied_weights_stay_tied_and_shared_layers_are_left_out_once():
    network = build_without_weights(Tied, lambda model: ["body"])
    assert network.head.weight is network.embed.weight and not network.embed.weight.is_meta
    assert network.again is network.body and network.body.weight.is_meta and not network.body.bias.is_meta
    allocate(network.body)
    assert network.body.weight.device.type == "cpu" and network.body.weight.shape == (4, 4)


@pytest.mark.parametrize(
    ("storage", "stepwise"),
    [("dense", False), ("residual", False), ("int8", False), ("dense", True), ("residual", True)],
)
def test_a_module_holds_what_one_around_the_plain_network_holds(tiny_llama, storage, stepwise):
    group = {"group_size": 16} if storage == "int8" else {}
    layers = PoetLayers(block_size=8, storage=storage, **group, stepwise=stepwise, exclude=["*lm_head*", "*q_proj"],
                        overrides={"*k_proj": {"init": "keep"}})  # fmt: skip
    states = []
    for build in (CausalLM(tiny_llama), lambda: CausalLM(tiny_llama)()):
        torch.manual_seed(5)
        module = PoetModule(build, layers, merge_every=1)
        module.configure_model()
        states.append(module.state_dict())
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_subclass_that_wraps_other_layers_gets_a_whole_network(tiny_llama):
    class Half(PoetModule):
        def wrap(self, model):
            PoetLayers(block_size=8, include=["*mlp*"]).apply_(model, self.seed)

    module = Half(CausalLM(tiny_llama), PoetLayers(block_size=8))
    module.configure_model()
    assert not any(value.is_meta for value in module.state_dict().values())


def test_a_module_whose_layers_do_not_fit_can_be_moved(tiny_llama):
    module = PoetModule(CausalLM(tiny_llama), PoetLayers(block_size=8, overrides={"*down_proj": {"block_size": 64}}))
    for _ in range(2):
        with pytest.raises(ConfigurationError, match="down_proj"):
            module.configure_model()
        assert not list(module.double().parameters())


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (PoetLayers(block_size=8, overrides={"*down_proj": {"block_size": 64}}), "down_proj .32 x 48.*block_size"),
        (PoetLayers(block_size=8, storage="int8", group_size=32), "down_proj .32 x 48.*group_size=32"),
        (OftLayers(block_size=8, overrides={"*down_proj": {"block_size": 10}}), "down_proj .32 x 48.*10"),
        (OftLayers(block_size=8, storage="int8", group_size=32), "down_proj .32 x 48.*group_size=32"),
    ],
)
def test_a_layer_that_does_not_fit_leaves_the_network_as_it_was(tiny_llama, layers, message):
    network = CausalLM(tiny_llama)()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(ConfigurationError, match=message):
        layers.apply_(network)
    after = network.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.requires_grad for parameter in network.parameters())


PEAK = """
import sys, torch
from torch import nn
import transformers.models.llama.modeling_llama, bitsandbytes
from orthotrain.models import CausalLM
from orthotrain.modules import PoetLayers, PoetModule

def resident(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 2**10

torch.set_num_threads(1)
torch.set_default_dtype(torch.bfloat16)

def build(layers):
    config = dict(vocab_size=256, hidden_size=512, intermediate_size=2048, num_hidden_layers=layers,
                  num_attention_heads=8, max_position_embeddings=64)
    module = PoetModule(CausalLM(config), PoetLayers(block_size=16, storage=storage))
    module.configure_model()
    return module

for storage in ("dense", "nf4"):
    build(1)
    before = resident("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")
    module = build(8)
    held = sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers())) / 2**20
    print(storage, resident("VmHWM") - before - held)
    del module
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_is_the_weights_and_one_layer():
    command = [sys.executable, "-P", "-W", "ignore", "-c", PEAK]
    # the allocator shall give back what is freed, at once
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    # 8 layers of 8 MiB in bf16: a second copy of the weights would take 64 MiB; allocator and libraries take up to 40
    found = dict(line.split() for line in done.stdout.splitlines() if line.startswith(("dense", "nf4")))
    assert float(found["dense"]) < 48 and float(found["nf4"]) < 48, found


class Halved(CausalLM):
    """A builder of one's own, which changes the network that it has built."""

    def __call__(self):
        network = super().__call__()
        with torch.no_grad():
            network.get_input_embeddings().weight.mul_(0.5)
        return network


def test_a_builder_of_ones_own_builds_the_whole_network(tiny_llama):
    weights = []
    for builder in (CausalLM, Halved):
        torch.manual_seed(0)
        module = PoetModule(builder(tiny_llama), PoetLayers(block_size=8))
        module.configure_model()
        weights.append(module.model.get_input_embeddings().weight.detach())
    assert torch.equal(weights[1], 0.5 * weights[0])


def test_the_network_without_storage_draws_nothing():
    class Drawing(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.randn(3, device="cpu"))
            self.layer = nn.Linear(3, 3)

    torch.manual_seed(0)
    expected = Drawing().factor
    torch.manual_seed(0)
    assert torch.equal(build_without_weights(Drawing, lambda network: ["layer"]).factor, expected)


def test_a_replaced_layer_that_somebody_still_holds_cannot_be_called(tiny_llama):
    network = CausalLM(tiny_llama)()
    held = network.model.layers[0].mlp.down_proj
    PoetLayers(block_size=8).apply_(network)
    with pytest.raises(TypeError, match="weight"):
        held(torch.randn(1, 48))
