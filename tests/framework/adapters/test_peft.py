"""PEFT adapters in and out, against the installed PEFT: the same outputs in both directions, and every refusal."""

import copy
import json
import random
import re
import shutil
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import OFTConfig, PeftModel, get_peft_model
from peft.tuners.oft.layer import OFTLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from orthotrain.adapters import adapter_state, export_peft, import_peft
from orthotrain.adapters.peft_export import task_type
from orthotrain.adapters.peft_folder import nearest_divisor
from orthotrain.errors import ConfigurationError
from orthotrain.layers import (
    OftConv2d,
    OftEmbedding,
    OftLinear,
    OftSettings,
    PoetLinear,
    mergeable_layers,
    replace_linears,
)
from orthotrain.models import PretrainedModel
from orthotrain.modules import OftLayers

IDS = torch.arange(24).view(2, 12)


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def wrap(base, include=("*_proj",), sizes=None, std=0.05, **options):
    network = copy.deepcopy(base).requires_grad_(False)
    names = {module: name for name, module in network.named_modules()}
    options = {"block_size": 8, **options}

    def factory(linear):
        own = [size for pattern, size in (sizes or {}).items() if pattern in names[linear]]
        return OftLinear.from_linear(linear, **{**options, "block_size": (own or [options["block_size"]])[0]})

    replace_linears(network, include, factory=factory)
    return randomized(network, std).eval()


def randomized(network, std=0.05):
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for _, layer in mergeable_layers(network):
            for parameter in layer.rotation_parameters():
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
            layer.project_()
    return network


def peft_network(base, folder=None, std=0.05, **options):
    """A PEFT model with random generators, saved."""
    options = {"target_modules": ["q_proj", "down_proj"], "oft_block_size": 8, **options}
    network = get_peft_model(copy.deepcopy(base), OFTConfig(**options)).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.requires_grad and ("oft_" in name or "modules_to_save" in name):
                parameter.add_(std * torch.randn(parameter.shape))
    if folder is not None:
        network.save_pretrained(folder, save_embedding_layers=False)
    return network


def same(a, b, x=IDS):
    with torch.no_grad():
        a, b = (out.logits if hasattr(out, "logits") else out for out in (a(x), b(x)))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def differs(a, b):
    with torch.no_grad():
        assert (a(IDS).logits - b(IDS).logits).abs().max() > 1e-3


def order(k):
    return {"class_path": "cayley_neumann", "init_args": {"order": k}}


OUT = {
    "cayley": {"parameterization": "cayley"},
    "order 2": {"parameterization": order(2)},
    "order 3": {"parameterization": order(3)},
    "order 4": {"parameterization": order(4)},
    "order 7": {"parameterization": order(7)},
    "shared": {"block_share": True},
    "shared, one block": {"block_share": True, "block_size": 32, "sizes": {"down": 24}},
    "coft": {"coft_eps": 0.2},
    "coft, shared": {"coft_eps": 0.2, "block_share": True, "include": ("*q_proj",)},
    "dropout": {"block_dropout": 0.25},
    "some layers": {"include": ("*q_proj", "*up_proj")},
    "blocks": {"sizes": {"down_proj": 12}},
    "adjusted": {"block_size": 32, "sizes": {"down_proj": 24}},
}  # fmt: skip


@pytest.mark.parametrize("case", OUT)
def test_peft_computes_what_was_exported(base, tmp_path, case):
    options = dict(OUT[case])
    network = wrap(base, std=0.4 if "coft" in case else 0.1, **options)
    state = adapter_state(network)
    folder = export_peft(network, tmp_path / "out", "some/base")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    differs(network, base)
    same(network, loaded)
    assert sum(isinstance(m, OFTLayer) for m in loaded.modules()) == len(list(mergeable_layers(network)))
    back = copy.deepcopy(base)
    import_peft(back, folder, check_base=False)
    # the bound of COFT is taken anew, to the last bit of it
    torch.testing.assert_close(adapter_state(back), state, atol=0, rtol=1e-6 if "coft" in case else 0)
    same(network, back)


IN = {
    "series": {},
    **{f"{terms} terms": {"num_cayley_neumann_terms": terms} for terms in (3, 4, 6)},
    "exact": {"use_cayley_neumann": False},
    "blocks": {"r": 4, "oft_block_size": 0},
    "adjusted size": {"oft_block_size": 32},
    "adjusted number": {"r": 5, "oft_block_size": 0},
    "shared": {"block_share": True},
    "coft": {"coft": True, "eps": 0.3},
    "coft, shared, exact": {"coft": True, "eps": 0.3, "block_share": True, "use_cayley_neumann": False},
    "dropout": {"module_dropout": 0.1},
    "norm": {"modules_to_save": ["model.norm"]},
    "all": {"target_modules": "all-linear"},
    "pattern": {"target_modules": r".*self_attn\.[qk]_proj"},
}


@pytest.mark.parametrize("case", IN)
@pytest.mark.filterwarnings("ignore:Invalid")
def test_what_peft_saved_computes_the_same_here(base, tmp_path, case):
    theirs = peft_network(base, tmp_path / "in", std=0.3 if "coft" in case else 0.05, **IN[case])
    ours = copy.deepcopy(base)
    names = import_peft(ours, tmp_path / "in")
    differs(ours, base)
    same(ours, theirs)
    targets = {n.removeprefix("base_model.model.") for n, m in theirs.named_modules() if isinstance(m, OFTLayer)}
    assert set(names) == targets
    trained = {name for name, p in ours.named_parameters() if p.requires_grad}
    extra = {"model.norm.weight"} if case == "norm" else set()
    assert trained == extra | {f"{name}.rotation_in.generators" for name in names}
    again = export_peft(ours, tmp_path / "out")
    same(ours, PeftModel.from_pretrained(copy.deepcopy(base), again).eval())


@pytest.mark.parametrize("seed", range(6))
def test_a_random_configuration_goes_both_ways(base, tmp_path, seed):
    choice = random.Random(seed)
    cayley = choice.choice([True, False])
    options = {
        "target_modules": choice.sample(["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"], 3),
        "oft_block_size": choice.choice([2, 4, 8, 16, 24]),
        "block_share": choice.choice([True, False]),
        "use_cayley_neumann": not cayley,
        "num_cayley_neumann_terms": choice.randint(3, 8),
        **({"coft": True, "eps": choice.choice([0.05, 0.4])} if choice.random() < 0.4 else {}),
    }
    theirs, ours = peft_network(base, tmp_path / "theirs", **options), copy.deepcopy(base)
    import_peft(ours, tmp_path / "theirs")
    same(theirs, ours)
    differs(ours, base)
    folder = export_peft(ours, tmp_path / "ours")
    same(ours, PeftModel.from_pretrained(copy.deepcopy(base), folder).eval())


def test_modules_trained_outside_the_layers_go_along(base, tmp_path):
    network = wrap(base, ("*q_proj",))
    for module in (network.model.norm, network.lm_head):
        module.requires_grad_(True)
        with torch.no_grad():
            module.weight.mul_(1.5)
    folder = export_peft(network, tmp_path / "out")
    assert json.loads((folder / "adapter_config.json").read_text())["modules_to_save"] == ["model.norm", "lm_head"]
    same(network, PeftModel.from_pretrained(copy.deepcopy(base), folder).eval())
    back = copy.deepcopy(base)
    import_peft(back, folder)
    same(network, back)
    assert back.lm_head.weight.requires_grad and not back.model.embed_tokens.weight.requires_grad


@pytest.mark.parametrize("saved", ["lm_head", "embed_tokens"])
def test_a_saved_module_that_is_tied_is_refused_until_it_is_untied(base, tmp_path, saved):
    tied = LlamaForCausalLM(LlamaConfig.from_dict({**base.config.to_dict(), "tie_word_embeddings": True})).eval()
    theirs = peft_network(tied, tmp_path, modules_to_save=[saved], std=0.2)
    ours, before = copy.deepcopy(tied), copy.deepcopy(tied.state_dict())
    with pytest.raises(ConfigurationError, match=f"{saved}.weight is tied to .* untie them first"):
        import_peft(ours, tmp_path)
    assert not list(mergeable_layers(ours)) and all(p.requires_grad for p in ours.parameters())
    torch.testing.assert_close(ours.state_dict(), before, rtol=0, atol=0)
    ours.lm_head.weight = nn.Parameter(ours.lm_head.weight.detach().clone())
    ours.config.tie_word_embeddings = False
    import_peft(ours, tmp_path)
    same(theirs, ours)
    differs(ours, tied)


def test_bounds_that_differ_by_rounding_are_one_setting(base, tmp_path):
    network = wrap(base, coft_eps=0.1)
    network.model.layers[0].mlp.down_proj.rotation_in.coft_eps = 0.10000000000000002
    export_peft(network, tmp_path / "out")
    network.model.layers[0].mlp.down_proj.rotation_in.coft_eps = 0.1001
    with pytest.raises(ConfigurationError, match="needs eps=0.1 and .*down_proj eps=0.1001"):
        export_peft(network, tmp_path / "other")


class Speech(nn.Module):
    """Has the name of a sequence-to-sequence model, and takes sound."""

    prepare_inputs_for_generation = None

    def forward(self, input_features, labels=None, **kwargs):
        return input_features


def test_a_task_is_written_only_where_the_class_of_peft_works(base):
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    small = {"d_model": 16, "vocab_size": 32, "encoder_layers": 1, "decoder_layers": 1, "pad_token_id": 1, **heads}
    assert task_type(base) == "CAUSAL_LM" and task_type(base.model) is None
    with torch.device("meta"):
        bart = BartForConditionalGeneration(BartConfig(**small))
        whisper = WhisperForConditionalGeneration(WhisperConfig(**small))
    assert task_type(bart) == "SEQ_2_SEQ_LM" and task_type(whisper) is None
    for name in ("SpeechForCausalLM", "SpeechForConditionalGeneration"):
        assert task_type(type(name, (Speech,), {})()) is None


class Pixels(nn.Module):
    """An embedding, a 1x1 convolution with groups and stride, a linear: all three kinds of layer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(96, 16)
        self.conv = nn.Conv2d(16, 8, 1, stride=2, groups=2)
        self.proj = nn.Linear(24, 24)
        self.proj2 = nn.Linear(24, 24)

    def forward(self, index):
        return self.proj2(self.proj(self.conv(self.embed(index).mT[..., None]).flatten(1)[:, :24]))


@pytest.mark.parametrize("parameterization", ["cayley", "cayley_neumann"])
def test_embeddings_and_1x1_convolutions_go_both_ways(tmp_path, parameterization):
    plain = Pixels()
    network = copy.deepcopy(plain)
    network.embed = OftEmbedding.from_settings(network.embed, OftSettings(8, parameterization))
    network.conv = OftConv2d.from_settings(network.conv, OftSettings(8, parameterization))
    network.proj = OftLinear.from_linear(network.proj, 8, parameterization)
    randomized(network.requires_grad_(False))
    folder = export_peft(network, tmp_path / "out")
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), folder).eval()
    same(network, loaded)
    loaded.save_pretrained(tmp_path / "in", save_embedding_layers=False)
    back = copy.deepcopy(plain)
    assert import_peft(back, tmp_path / "in") == ["embed", "conv", "proj"]
    same(network, back)
    with pytest.raises(ConfigurationError, match=r"base_layer.weight belongs to the base: .*save_embedding_layers"):
        tensors = load_file(folder / "adapter_model.safetensors")
        rewrite(folder, {**tensors, "base_model.model.embed.base_layer.weight": torch.ones(96, 16)})
        import_peft(copy.deepcopy(plain), folder)


def test_running_statistics_go_along(tmp_path):
    """Training changes the statistics of a frozen batch normalization."""
    plain = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 4))
    network, x = copy.deepcopy(plain), torch.randn(8, 16)
    network[0] = OftLinear.from_linear(network[0], 8)
    randomized(network.requires_grad_(False))
    network.train()(3 * x + 1)
    folder = export_peft(network.eval(), tmp_path / "out")
    loaded = PeftModel.from_pretrained(copy.deepcopy(plain), folder).eval()
    torch.testing.assert_close(loaded(x), network(x), rtol=1e-5, atol=1e-5)
    back = copy.deepcopy(plain)
    import_peft(back, folder)
    torch.testing.assert_close(back.eval()(x), network(x), rtol=1e-5, atol=1e-5)


@pytest.fixture
def nf4_base(tmp_path):
    """A network in fp32, and what loads it with its linears in NF4 as transformers quantises them."""
    config = LlamaConfig(
        vocab_size=96, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2
    )
    plain = LlamaForCausalLM(config).eval()
    plain.save_pretrained(tmp_path / "base")

    def load():
        network = PretrainedModel(str(tmp_path / "base"), dtype="float32", load_in_4bit=True)()
        for module in network.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                # else an eval forward repacks its weight, which is then another one
                module.support_avx512bf16_for_cpu = False
        return network.eval()

    return plain, load


@pytest.mark.parametrize("quantised_by", ["transformers", "us"])
def test_an_adapter_trained_over_nf4_loads_in_peft_over_nf4(nf4_base, tmp_path, quantised_by):
    plain, load = nf4_base
    network = load() if quantised_by == "transformers" else copy.deepcopy(plain)
    OftLayers(block_size=16, storage=None if quantised_by == "transformers" else "nf4").apply_(network)
    optimizer = torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(4):
        losses.append(network(IDS, labels=IDS).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.1
    folder = export_peft(network.eval(), tmp_path / "out")
    differs(network, load())
    # the same packed weights and the same fp32 arithmetic: equal to rounding
    same(network, PeftModel.from_pretrained(load(), folder).eval())
    differs(network, PeftModel.from_pretrained(copy.deepcopy(plain), folder).eval())
    back = load()
    import_peft(back, folder, check_base=False)
    same(network, back)


@pytest.mark.parametrize(
    ("storage", "said"), [("nf4", 'bnb_4bit_quant_type="nf4"'), ("int8", "no such format"), (None, "None.")]
)
def test_the_card_says_how_the_base_was_quantized(base, tmp_path, storage, said):
    network = wrap(base, ("*q_proj",), storage=storage, group_size=32 if storage == "int8" else None)
    folder = export_peft(network, tmp_path / "out", base_model_name="a: base")
    text = (folder / "README.md").read_text()
    assert said in text and 'base_model: "a: base"' in text
    assert bool(storage) == (f"in {storage}" in text)
    assert set(json.loads((folder / "adapter_config.json").read_text())) <= {*OFTConfig().to_dict(), "peft_version"}


def test_a_last_name_that_others_share_becomes_a_pattern(base, tmp_path):
    plain = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    network = copy.deepcopy(plain).requires_grad_(False)
    network[1][0] = OftLinear.from_linear(network[1][0], 4)
    randomized(network)
    folder = export_peft(network, tmp_path / "out")
    assert json.loads((folder / "adapter_config.json").read_text())["target_modules"] == r"1\.0"
    same(network, PeftModel.from_pretrained(copy.deepcopy(plain), folder), torch.randn(3, 8))


@pytest.mark.parametrize("width", [1, 2, 24, 48, 97, 688])
def test_the_adjusted_size_is_pefts(base, width):
    layer = next(m for m in peft_network(base).modules() if isinstance(m, OFTLayer))
    for size in range(1, width + 3):
        used = size if width % size == 0 else layer.adjust_oft_parameters(width, size)
        assert nearest_divisor(width, size) == used


def broken(base, change, **options):
    network = wrap(base, **options)
    change(network)
    return network


def share(network):
    network.model.layers[0].self_attn.k_proj = network.model.layers[0].self_attn.q_proj


def tie(network):
    network.model.embed_tokens.weight = network.lm_head.weight
    network.lm_head.requires_grad_(True)


def train_bias(network):
    network.model.layers[0].self_attn.q_proj.bias = nn.Parameter(torch.zeros(32))


def convolution(network):
    network.vision = OftConv2d.from_settings(nn.Conv2d(8, 8, 3), OftSettings(8))


def own_parameter(network):
    network.model.scale = nn.Parameter(torch.ones(1))


def alike(network):
    network.other = nn.ModuleDict({"model": nn.ModuleDict({"norm": nn.LayerNorm(4)})}).requires_grad_(False)
    network.model.norm.requires_grad_(True)


REFUSED_OUT = {
    "order 1": (dict(parameterization=order(1)), None, r"q_proj: PEFT has no CayleyNeumann\(order=1\).*export"),
    "exponential": (dict(parameterization="exponential"), None, r"q_proj: PEFT has no Exponential\(\).*export"),
    "sizes": (dict(sizes={"q_proj": 16, "k_proj": 4}), None, r"one block size.*q_proj 16 of 32.*k_proj 4 of 32"),
    "shared coft": (dict(coft_eps=0.2, block_share=True), None, r"q_proj needs eps=0.1\d* and .*down_proj eps="),
    "exceeded": (dict(coft_eps=0.2), lambda n: randomized_alone(n), r"q_proj: generators exceed coft_eps=0.2"),
    "disabled": ({}, lambda n: setattr(layer_of(n), "enabled", False), r"q_proj: its rotation is disabled"),
    "bias": ({}, train_bias, r"q_proj: its bias is trained"),
    "mixed": ({}, lambda n: setattr(layer_of(n).rotation_in, "block_dropout", 0.5), r"module_dropout=0.5 and .*k_proj"),
    "convolution": ({}, convolution, r"vision: PEFT rotates the patches of a convolution.*\(3, 3\)"),
    "shared layer": ({}, share, r"self_attn.q_proj is also used as .*k_proj"),
    "tied": ({}, tie, r"the trained \S+weight is tied to \S+weight"),
    "own parameter": ({}, own_parameter, r"model has a trained parameter and submodules"),
    "alike": ({}, alike, r"PEFT would save other.model.norm along with the trained model.norm"),
    "poet": ({}, lambda n: setattr(n, "x", PoetLinear.from_linear(nn.Linear(8, 8), block_size=4)), "x is a PoetLinear"),
}  # fmt: skip


def layer_of(network):
    return network.model.layers[0].self_attn.q_proj


def randomized_alone(network):
    with torch.no_grad():
        layer_of(network).rotation_in.generators.fill_(1.0)


@pytest.mark.parametrize("case", REFUSED_OUT)
def test_what_peft_cannot_represent_is_refused_by_name(base, tmp_path, case):
    options, change, message = REFUSED_OUT[case]
    network = broken(base, change or (lambda n: None), **options)
    with pytest.raises(ConfigurationError, match=message):
        export_peft(network, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_a_folder_that_is_not_empty_is_refused(base, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="exists and is not empty"):
        export_peft(wrap(base), tmp_path)


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
    """A small adapter of PEFT's."""
    folder = tmp_path_factory.mktemp("peft") / "saved"
    peft_network(base, folder, target_modules=["q_proj"])
    return folder


def rewrite(folder, tensors=None, **config):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    if tensors is not None:
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


NAME = "base_model.model.model.layers.0.self_attn.q_proj.oft_R.weight"
REFUSED_CONFIG = {
    "LoRA": ({"peft_type": "LORA"}, "peft_type='LORA': only OFT"),
    "bias": ({"bias": "oft_only"}, "bias='oft_only'"),
    "unknown": ({"use_householder": True}, "unknown setting use_householder=True"),
    "terms": ({"num_cayley_neumann_terms": 2}, "num_cayley_neumann_terms=2: 3 to 100 can be loaded"),
    "many terms": ({"num_cayley_neumann_terms": 10**9}, "num_cayley_neumann_terms=1000000000: 3 to 100"),
    "kind": ({"use_cayley_neumann": 1}, "use_cayley_neumann=1 is not a bool"),
    "eps": ({"coft": True, "eps": 0}, "eps=0: COFT needs a positive bound"),
    "dropout": ({"module_dropout": 1.0}, "q_proj: block_dropout=1.0"),
    "old": ({"peft_version": "0.17.1"}, "peft_version='0.17.1': PEFT 0.18 changed"),
    "no version": ({"peft_version": None}, "peft_version=None: PEFT 0.18 changed"),
    "base": ({"base_model_name_or_path": "other/base"}, "trained on 'other/base', the network is ''.*check_base=False"),
    "saved": ({"modules_to_save": "norm"}, "modules_to_save='norm' is not a list"),
    "shared": ({"block_share": True}, r"q_proj: 4 rows of generators with block_share=True"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED_CONFIG)
def test_a_configuration_that_cannot_be_loaded_is_refused(base, saved, tmp_path, case):
    changes, message = REFUSED_CONFIG[case]
    shutil.copytree(saved, tmp_path / "in")
    rewrite(tmp_path / "in", **changes)
    check_refused(base, tmp_path / "in", message)
    if case == "base":
        import_peft(copy.deepcopy(base), tmp_path / "in", check_base=False)


REFUSED_TENSORS = {
    "nothing": ({}, "has no tensor base_model"),
    "unknown": ({NAME: torch.zeros(4, 28), "model.norm.weight": torch.zeros(32)}, "unknown tensor model.norm.weight"),
    "not saved": ({NAME: torch.zeros(4, 28), "base_model.model.model.norm.weight": torch.zeros(32)}, "unknown tensor"),
    "columns": ({NAME: torch.zeros(4, 27)}, r"q_proj: generators of shape \(4, 27\).* width of 32"),
    "rows": ({NAME: torch.zeros(3, 28)}, r"q_proj: generators of shape \(3, 28\).* width of 32"),
    "blocks of one": ({NAME: torch.zeros(32, 0)}, r"q_proj: generators of shape \(32, 0\)"),
    "dimensions": ({NAME: torch.zeros(4, 8, 8)}, r"q_proj: generators of shape \(4, 8, 8\)"),
    "integers": ({NAME: torch.zeros(4, 28, dtype=torch.int32)}, "generators in torch.int32"),
    "not finite": ({NAME: torch.full((4, 28), torch.nan)}, "values that are not finite"),
    "no such layer": ({NAME.replace("layers.0", "layers.9"): torch.zeros(4, 28)}, "layers.9.*does not have"),
    "norm": ({NAME.replace("layers.0.self_attn.q_proj", "norm"): torch.zeros(4, 28)}, "LlamaRMSNorm cannot be wrapped"),
    "embedding": ({NAME.replace("oft_R", "oft_embedding_R"): torch.zeros(4, 28)}, "oft_embedding_R for a Linear"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED_TENSORS)
def test_tensors_that_do_not_fit_are_refused(base, saved, tmp_path, case):
    tensors, message = REFUSED_TENSORS[case]
    shutil.copytree(saved, tmp_path / "in")
    rewrite(tmp_path / "in", tensors)
    check_refused(base, tmp_path / "in", message)


def test_a_saved_module_of_another_shape_is_refused(base, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "in")
    rewrite(tmp_path / "in", {NAME: torch.zeros(4, 28), "base_model.model.model.norm.weight": torch.zeros(31)},
            modules_to_save=["norm"])  # fmt: skip
    check_refused(base, tmp_path / "in", r"norm.weight is \(31,\) torch.float32, in the network \(32,\)")


def check_refused(base, folder, message):
    network = copy.deepcopy(base)
    with pytest.raises(ConfigurationError, match=message) as caught:
        import_peft(network, folder)
    assert "\n" not in str(caught.value)
    assert not list(mergeable_layers(network))
    same(network, base)


def test_missing_files_and_pickles_are_refused(base, saved, tmp_path):
    check_refused(base, tmp_path, "has no adapter_config.json")
    folder = tmp_path / "in"
    shutil.copytree(saved, folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    check_refused(base, folder, "adapter_model.bin, a pickle, which can run code and is never read")
    (folder / "adapter_model.bin").unlink()
    check_refused(base, folder, "has no adapter_model.safetensors")
    shutil.copytree(saved, folder, dirs_exist_ok=True)
    (folder / "adapter_config.json").write_text("[1, 2")
    check_refused(base, folder, "is not valid JSON")
    (folder / "adapter_config.json").write_text("[1, 2]")
    check_refused(base, folder, "not a dictionary of settings")


@pytest.mark.parametrize("length", [2**63, 2**40, 10, 0])
def test_a_header_that_lies_about_its_size_is_refused(base, saved, tmp_path, length):
    shutil.copytree(saved, tmp_path / "in")
    path = tmp_path / "in" / "adapter_model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    check_refused(base, tmp_path / "in", "not a safetensors file")


def test_a_tied_layer_and_a_wide_convolution_are_refused(base, saved, tmp_path):
    shutil.copytree(saved, tmp_path / "in")
    tied = copy.deepcopy(base)
    tied.model.layers[0].self_attn.k_proj.weight = tied.model.layers[0].self_attn.q_proj.weight
    with pytest.raises(ConfigurationError, match=r"q_proj.weight is tied to \S+k_proj.weight"):
        import_peft(tied, saved)
    rewrite(tmp_path / "in", {"base_model.model.0.oft_R.weight": torch.zeros(9, 28)})
    with pytest.raises(ConfigurationError, match="layer 0: PEFT rotates the patches of a convolution"):
        import_peft(nn.Sequential(nn.Conv2d(8, 8, 3)), tmp_path / "in")


def test_a_wrapped_network_takes_an_adapter_of_its_kind_only(base, saved):
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), saved).eval()
    fitting = wrap(base, ("*q_proj",), parameterization=order(3), block_dropout=0.1)
    import_peft(fitting, saved)
    same(fitting, theirs)
    for options, message in [
        ({"block_size": 16}, "q_proj: it is wrapped with block_size 16, the adapter needs 8"),
        ({"parameterization": order(4)}, r"parameterization CayleyNeumann\(order=4\), the adapter needs .*order=3"),
        ({"parameterization": order(3), "block_share": True}, "rows of generators 1, the adapter needs 4"),
        ({"parameterization": order(3), "coft_eps": 0.1}, "coft_eps 0.1, the adapter needs None"),
    ]:
        with pytest.raises(ConfigurationError, match=message):
            import_peft(wrap(base, ("*q_proj",), **options), saved)
    with pytest.raises(ConfigurationError, match="layers.0.self_attn.k_proj is wrapped, but the adapter does not"):
        import_peft(wrap(base, ("*q_proj", "*k_proj"), parameterization=order(3)), saved)


@pytest.fixture(scope="module")
def exported(base, tmp_path_factory):
    """An adapter of ours, whose checksum covers settings and tensors, and what it holds."""
    network = wrap(base, ("*q_proj",))
    folder = export_peft(network, tmp_path_factory.mktemp("ours") / "exported")
    return folder, adapter_state(network)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_files_are_refused_or_load_the_same(base, exported, tmp_path, name, data):
    folder, state = exported
    content = bytearray((folder / name).read_bytes())
    if data.draw(st.booleans(), "truncate"):
        content = content[: data.draw(st.integers(0, len(content) - 1), "length")]
    else:
        # half of the flips in the header, where they do most
        end = data.draw(st.sampled_from([300, len(content)]))
        content[data.draw(st.integers(0, min(end, len(content)) - 1), "at")] ^= data.draw(st.integers(1, 255), "by")
    copied = tmp_path / "in"
    shutil.copytree(folder, copied, dirs_exist_ok=True)
    (copied / name).write_bytes(bytes(content))
    network = nn.Module()
    network.model = nn.Module()
    network.model.layers = nn.ModuleList([nn.Module()])
    network.model.layers[0].self_attn = nn.ModuleDict({"q_proj": nn.Linear(32, 32), "k_proj": nn.Linear(32, 32)})
    try:
        import_peft(network, copied)
    except ConfigurationError:
        return
    loaded = adapter_state(network)
    assert set(loaded) == set(state) and all(torch.equal(loaded[key], state[key]) for key in state)
    (layer,) = (layer for _, layer in mergeable_layers(network))
    assert re.fullmatch(r"CayleyNeumann\(order=4\)", repr(layer.rotation_in.parameterization))
