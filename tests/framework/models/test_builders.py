"""Model builders: from a configuration, from a folder, and what they refuse."""

import json
import os

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from orthotrain.console.limited_process import LimitExceeded, call_limited
from orthotrain.errors import ConfigurationError
from orthotrain.models import CausalLM, PretrainedModel, network_size


def test_builds_from_a_configuration_and_from_a_folder(tiny_llama, tmp_path):
    built = CausalLM(tiny_llama)()
    assert built.training and built.config.hidden_size == 32
    built.save_pretrained(tmp_path / "model")
    loaded = PretrainedModel(str(tmp_path / "model"))()
    ids = torch.arange(8)[None]
    assert torch.equal(built(ids).logits, loaded(ids).logits)
    assert PretrainedModel(str(tmp_path / "model"), dtype="bfloat16")().dtype == torch.bfloat16


def test_other_model_types():
    config = {"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2}
    assert CausalLM(config, "gpt2")()(torch.arange(4)[None]).logits.shape == (1, 4, 50)


def test_bad_input_is_refused_with_the_nearest_name(tmp_path):
    with pytest.raises(ConfigurationError, match="'hiden_size'; try hidden_size"):
        CausalLM({"hiden_size": 4})
    with pytest.raises(ConfigurationError, match="model_type='lama' is unknown to transformers; try llama"):
        CausalLM({}, "lama")
    with pytest.raises(ConfigurationError, match="config.model_type 'gpt2': the network is a llama; choose it by"):
        CausalLM({"model_type": "gpt2"})
    assert CausalLM({"model_type": "gpt2"}, "gpt2").model_type == "gpt2"
    with pytest.raises(ConfigurationError, match="cannot be loaded"):
        PretrainedModel(str(tmp_path))()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("attention", ["someone/kernels", "someone/kernels@main:flash", {"": "someone/kernels"}])
def test_attention_that_a_configuration_would_fetch_is_refused(tiny_llama, tmp_path, key, attention, monkeypatch):
    """transformers reads it from config.json, and runs it where the package `kernels` is installed."""
    CausalLM(tiny_llama)().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: attention}))
    with pytest.raises(ConfigurationError, match="has attn_implementation='someone/kernels.*', which would fetch code"):
        PretrainedModel(str(tmp_path))()


def test_gradient_checkpointing_changes_memory_and_not_the_gradients(tiny_llama):
    import copy

    from orthotrain.cli.plan import saved_bytes
    from orthotrain.modules import PoetLayers

    torch.manual_seed(0)
    plain = CausalLM(tiny_llama)()
    PoetLayers(block_size=8).apply_(plain)
    tokens = torch.randint(0, 96, (2, 16))
    checkpointed = CausalLM(tiny_llama, gradient_checkpointing=True)()
    PoetLayers(block_size=8).apply_(checkpointed)
    checkpointed.load_state_dict(copy.deepcopy(plain.state_dict()))
    for network in (plain, checkpointed):
        network(input_ids=tokens, labels=tokens).loss.backward()
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6, msg=name)
    sizes = [saved_bytes(n, lambda n=n: n(input_ids=tokens, labels=tokens)) for n in (plain, checkpointed)]
    assert sizes[1] < 0.8 * sizes[0]


@pytest.fixture
def low_limits(monkeypatch):
    """Limits on the process that counts a network which are reached in a second, and not in many."""
    monkeypatch.setattr(network_size, "_SECONDS", 2.0)
    monkeypatch.setattr(network_size, "_MEMORY_BYTES", 128 << 20)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("num_hidden_layers", 10**8, "too large to be counted"),
        ("hidden_size", 2**40, "no network that can be built: RuntimeError"),
        ("vocab_size", 2**40, "a network of 70,368,744,195,248 values, more than"),
        ("vocab_size", 2**70, "no network that can be built"),
        ("vocab_size", 10**10, "GiB in torch.float32; this machine has"),
        ("num_attention_heads", 0, "ZeroDivisionError"),
        ("vocab_size", -3, "negative dimension"),
        ("hidden_size", "wide", "no network that can be built"),
    ],
)
def test_descriptions_that_no_machine_can_build_are_one_line(tiny_llama, low_limits, key, value, said):
    with pytest.raises(ConfigurationError, match=said) as caught:
        CausalLM({**tiny_llama, key: value})()
    assert "\n" not in str(caught.value) and "the llama configuration describes" in str(caught.value)


@pytest.mark.parametrize(
    ("model_type", "given", "said"),
    [
        ("qwen2", {}, r"num_key_value_heads=32 \(the default of qwen2\) does not divide num_attention_heads=4: set"),
        ("phi3", {}, r"pad_token_id=32000 \(the default of phi3\) is no token of a vocabulary of 96 .* or to null$"),
        ("gpt2", {"num_attention_heads": 5}, r"n_head=5 does not divide n_embd=32: set n_head to a divisor of 32$"),
        ("gpt_neo", {}, r"ValueError: .* Please verify the value of `config.attention_types` argument.$"),
        ("llama", {"hidden_act": "relo"}, r"hidden_act='relo' is unknown to transformers$"),
        ("phi", {"rope_parameters": {"rope_type": "no"}}, r"rope_parameters=.* is unknown to transformers$"),
    ],
)
def test_the_key_that_does_not_fit_is_named(model_type, given, said):
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    with pytest.raises(ConfigurationError, match=said) as caught:
        CausalLM({**sizes, **given}, model_type)()
    assert "\n" not in str(caught.value)


def test_a_plan_refuses_them_too(tiny_llama):
    with FakeTensorMode(), pytest.raises(ConfigurationError, match="values, more than 10,000,000,000,000"):
        CausalLM({**tiny_llama, "vocab_size": 2**40})()
    with FakeTensorMode():
        assert CausalLM({**tiny_llama, "vocab_size": 10**9})().config.vocab_size == 10**9


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [("num_hidden_layers", 10**8, "too large"), ("vocab_size", 2**40, "more than"), ("vocab_size", 10**11, "GiB")],
)
def test_a_folder_that_describes_such_a_network(tiny_llama, low_limits, tmp_path, key, value, said):
    CausalLM(tiny_llama)().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value, "layer_types": None}))
    with pytest.raises(ConfigurationError, match=said):
        PretrainedModel(str(tmp_path))()


@pytest.mark.parametrize("task", ["causal_lm", "sequence_classification"])
def test_options_that_describe_such_a_network(tiny_llama, low_limits, tmp_path, task):
    CausalLM(tiny_llama)().save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match=r"its config.json with the options describes .* too large"):
        PretrainedModel(str(tmp_path), task=task, options={"num_labels": 10**9})()


def test_a_head_for_tokens(tiny_llama, tmp_path):
    CausalLM(tiny_llama)().save_pretrained(tmp_path)
    network = PretrainedModel(str(tmp_path), task="token_classification", options={"num_labels": 5})()
    assert network(input_ids=torch.ones(2, 3, dtype=torch.long)).logits.shape == (2, 3, 5)
    assert network.fresh_parameters == ["score.bias", "score.weight"]


def test_the_configuration_of_a_subfolder_is_counted(tiny_llama, tmp_path):
    CausalLM(tiny_llama)().save_pretrained(tmp_path)
    CausalLM(tiny_llama)().save_pretrained(tmp_path / "inner")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "inner" / "config.json").write_text(json.dumps({**config, "vocab_size": 10**11}))
    with pytest.raises(ConfigurationError, match="its config.json with the options describes .* GiB"):
        PretrainedModel(str(tmp_path), options={"subfolder": "inner"})()


def test_a_lack_of_memory_behind_another_error_is_a_limit():
    def work():
        try:
            return len(bytearray(1 << 40))
        except MemoryError as error:
            raise ValueError("a field of the configuration") from error

    with pytest.raises(LimitExceeded, match="more than 64 MiB of memory"):
        call_limited(work, 64 << 20, 5.0)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_a_folder_with_what_is_no_regular_file(tiny_llama, tmp_path, name, kind):
    CausalLM(tiny_llama)().save_pretrained(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name) if kind == "fifo" else (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(ConfigurationError, match=f"{name}' is a {kind}, not a regular file"):
        PretrainedModel(str(tmp_path))()
