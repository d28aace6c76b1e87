"""Merged folders: what transformers loads computes what the run's network did, quantised or not, in any dtype."""

import json

import pytest
import torch
import yaml
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from orthotrain.cli.main import main
from orthotrain.data.tokenizers import train_tokenizer
from orthotrain.errors import ConfigurationError
from orthotrain.export import export_checkpoint, export_huggingface, load_network, make_plain_
from orthotrain.models import CausalLM, PretrainedModel
from orthotrain.modules import OftLayers, OftModule

IDS = torch.arange(24).view(2, 12)
SIZES = {"hidden_size": 128, "intermediate_size": 128, "initializer_range": 0.2}


@pytest.fixture
def base(tiny_llama, tmp_path):
    CausalLM({**tiny_llama, **SIZES})().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def logits(network):
    with torch.no_grad():
        return network.eval()(IDS).logits.float()


def off_by(actual, expected):
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("include", [["*"], ["*q_proj"]])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_loaded_in_4_bits_reloads_with_equal_logits(base, tmp_path, randomize, include, dtype):
    network = PretrainedModel(base, dtype=dtype, load_in_4bit=True)()
    OftLayers(block_size=16, include=include).apply_(network)
    expected = logits(randomize(network))
    folder = export_huggingface(network, tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert not hasattr(loaded.config, "quantization_config")
    assert {type(m) for n, m in loaded.named_modules() if n.endswith("_proj")} == {nn.Linear}
    assert off_by(logits(loaded), expected) < (1e-5 if dtype == "float32" else 6e-2)
    network.to(torch.float32)  # transformers refuses that to a model it takes for a quantised one


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_decides_what_is_saved(base, tmp_path, randomize, dtype):
    network = PretrainedModel(base, dtype="bfloat16")()
    OftLayers(block_size=16).apply_(network)
    expected = logits(randomize(network).float())
    loaded = AutoModelForCausalLM.from_pretrained(export_huggingface(network.bfloat16(), tmp_path / "m", dtype=dtype))
    assert {p.dtype for p in loaded.parameters()} == {getattr(torch, dtype)}
    assert off_by(logits(loaded), expected) < {"float32": 1e-5, "bfloat16": 6e-2, "float16": 5e-3}[dtype]


@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"options": {"attn_implementation": "eager"}}])
def test_the_exported_config_is_that_of_the_base(base, tmp_path, randomize, options):
    network = PretrainedModel(base, **options)()
    OftLayers(block_size=16).apply_(network)
    randomize(network)(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    folder = export_huggingface(network, tmp_path / "merged")
    for name in ("config.json", "generation_config.json"):
        assert (folder / name).read_text() == (tmp_path / "base" / name).read_text()


def test_refuses_what_a_dtype_cannot_hold_and_unknown_ones(tiny_llama, tmp_path):
    network = CausalLM(tiny_llama)()
    with torch.no_grad():
        network.model.norm.weight[3] = 1e6
    with pytest.raises(ConfigurationError, match="model.norm.weight exceeds what torch.float16 can hold"):
        export_huggingface(network, tmp_path / "out", dtype="float16")
    with pytest.raises(ConfigurationError, match="dtype='int8': choose one of float32, bfloat16, float16"):
        export_huggingface(network, tmp_path / "out", dtype="int8")
    with pytest.raises(ConfigurationError, match="--dtype float32 with --format peft"):
        export_checkpoint("none.ckpt", tmp_path / "out", "peft", "float32")
    assert not (tmp_path / "out").exists()


def test_a_plain_network_has_no_new_parameters_left(tiny_llama):
    network = CausalLM(tiny_llama)()
    network.fresh_parameters = ["lm_head.weight"]
    make_plain_(network)
    assert not hasattr(network, "fresh_parameters")


def test_a_base_model_that_has_moved_is_named(base, tmp_path):
    module = OftModule(PretrainedModel(base, dtype="float32"), OftLayers(block_size=16))
    module.configure_model()
    network = {"class_path": "orthotrain.PretrainedModel", "init_args": {"name": base, "dtype": "float32"}}
    described = {"class_path": "orthotrain.OftModule", "init_args": {"model": network, "layers": {"block_size": 16}}}
    contents = {"state_dict": module.state_dict(), "hyper_parameters": described}
    module.on_save_checkpoint(contents)
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ConfigurationError, match="base': give an existing path .--base for a base model"):
        load_network(contents)
    loaded = load_network(contents, base=tmp_path / "moved")
    assert torch.equal(logits(loaded), logits(module.model)) and network["init_args"]["name"] == base
    network["class_path"], network["init_args"] = "orthotrain.CausalLM", {}
    with pytest.raises(ConfigurationError, match="--base 'x': checkpoint is of a run without a base model"):
        load_network(contents, base="x")


def test_an_enlarged_vocabulary_is_trained_resumed_and_exported(tiny_llama, tmp_path, capsys):
    base, last = str(tmp_path / "base"), tmp_path / "run" / "checkpoints" / "last.ckpt"
    tokenizer = train_tokenizer(["repeat it 0123456789"] * 2, 262)
    CausalLM({**tiny_llama, "vocab_size": 262})().save_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    tokenizer.save_pretrained(base)
    (tmp_path / "rows.json").write_text(json.dumps([{"prompt": f"repeat {n}", "response": f"{n}"} for n in range(20)]))
    model, data = {"name": base}, {"source": str(tmp_path / "rows.json"), "tokenizer": base, "batch_size": 2}
    options = {
        "model": {"class_path": "OftModule", "init_args": {"layers": {"block_size": 8}, "max_new_tokens": 0}},
        "data": {"class_path": "InstructionData", "init_args": {**data, "max_length": 32, "val_fraction": 0.0}},
        "trainer": {"accelerator": "cpu", "max_steps": 1, "enable_progress_bar": False, "logger": False},
        "report": None,
    }
    options["model"]["init_args"]["model"] = {"class_path": "PretrainedModel", "init_args": model}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options))
    command = ["fit", "-c", str(tmp_path / "run.yaml"), "--run_folder", str(tmp_path / "run")]
    with pytest.raises(SystemExit):
        main(command)
    assert "262 rows: set resize_vocabulary of PretrainedModel to true" in capsys.readouterr().err
    command += ["--model.model.resize_vocabulary", "true"]
    main(command)
    main([*command, "--ckpt_path", str(last), "--trainer.max_steps", "2"])
    with pytest.warns(UserWarning, match=r"resize_token_embeddings\(263\)"):
        export_checkpoint(last, tmp_path / "adapter", "peft")
    export_checkpoint(last, tmp_path / "merged")
    merged, plain = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("merged", "base"))
    embedding = plain.get_input_embeddings().weight
    assert torch.equal(
        merged.get_input_embeddings().weight,
        torch.cat([embedding, embedding.mean(0, dtype=torch.float64).float()[None]]),
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").convert_tokens_to_ids("<|new|>") == 262
