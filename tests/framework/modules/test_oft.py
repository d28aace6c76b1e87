"""OftModule in a real Trainer: published sizes, frozen base, metrics of generations, tasks of transformers."""

import json

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import BartConfig, BartForConditionalGeneration, LlamaConfig, LlamaForSequenceClassification

from orthotrain.callbacks import ProjectGenerators
from orthotrain.data import InstructionData
from orthotrain.errors import ConfigurationError
from orthotrain.layers import mergeable_layers
from orthotrain.models import CausalLM, PretrainedModel
from orthotrain.modules import OftLayers, OftModule, Optimization

# arXiv:2506.19847: trained numbers in millions, all seven linears of a decoder layer, b = 32
LLAMAS = {
    "Llama-2-7B": (4096, 11008, 32, 32, 32, 17.65),
    "Llama-2-13B": (5120, 13824, 40, 40, 40, 27.62),
    "Qwen2.5-1.5B": (1536, 8960, 28, 12, 2, 7.89),
    "Qwen2.5-7B": (3584, 18944, 28, 28, 4, 17.55),
    "Qwen2.5-32B": (5120, 27648, 64, 40, 8, 57.90),
}


def trained(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", LLAMAS)
def test_trained_numbers_equal_the_papers(name):
    hidden, ffn, layers, heads, kv_heads, published = LLAMAS[name]
    config = {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": 64,
    }
    with torch.device("meta"):
        model = CausalLM(config)()
        OftLayers(block_size=32).apply_(model)
    assert round(trained(model) / 1e6, 2) == published


def test_trained_numbers_of_bart_equal_the_papers():
    with torch.device("meta"):
        model = BartForConditionalGeneration(
            BartConfig(d_model=1024, encoder_layers=12, decoder_layers=12, encoder_ffn_dim=4096, decoder_ffn_dim=4096,
                       encoder_attention_heads=16, decoder_attention_heads=16, vocab_size=64)
        )  # fmt: skip
        OftLayers(block_size=64).apply_(model)
    assert round(trained(model) / 1e6, 2) == 8.52


@pytest.fixture
def instructions(tmp_path, corpus):
    rows = [{"prompt": f"say {word} twice", "response": f"{word} {word}"} for word in ("ab", "cd", "ef", "gh") * 12]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({**row, "prompt": f"{i} {row['prompt']}"}) for i, row in enumerate(rows)))
    from orthotrain.data import TextData

    text = TextData(str(corpus), vocab_size=320, val_fraction=0.2, test_fraction=0.0, cache_dir=str(tmp_path / "cache"))
    text.prepare_data()
    text.tokenizer.save_pretrained(tmp_path / "tokenizer")
    return InstructionData(
        str(tmp_path / "tokenizer"), str(path), max_length=64, batch_size=8, val_fraction=0.2, generation_samples=4
    )


def trainer_for(folder, **kwargs):
    defaults = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    return L.Trainer(**{**defaults, **kwargs})


@pytest.mark.parametrize("storage", [None, "nf4", "int8"])
def test_finetunes_only_the_rotations(tiny_llama, tmp_path, instructions, storage):
    size = {"hidden_size": 256, "intermediate_size": 256} if storage else {}
    module = OftModule(
        CausalLM({**tiny_llama, **size, "vocab_size": 320}),
        OftLayers(block_size=8, storage=storage),
        Optimization(lr=2e-2),
        max_new_tokens=4,
    )
    module.configure_model()
    before = {name: tensor.clone() for name, tensor in module.model.state_dict().items()}
    trainer = trainer_for(tmp_path, max_epochs=8)
    trainer.fit(module, datamodule=instructions)
    changed = {name for name, tensor in module.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if name.endswith("generators")}
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert {"val_loss", "val_token_accuracy", "val_exact_match", "val_rouge_l"} <= set(metrics)
    assert metrics["val_loss"] < 5.7  # ln 320 = 5.77, an untrained network
    text = next(tmp_path.rglob("val_samples.txt")).read_text()
    assert "say" in text and "===" in text


def test_trains_extra_parameters_and_refuses_patterns_without_a_match(tiny_llama):
    model = CausalLM(tiny_llama)()
    OftLayers(block_size=8, overrides={"*down_proj": {"block_size": 16}}, train=["*norm*"]).apply_(model)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("norm" in name or name.endswith("generators") for name in names) and "model.norm.weight" in names
    sizes = {name.split(".")[-1]: layer.rotation_in.block_size for name, layer in mergeable_layers(model)}
    assert sizes["down_proj"] == 16 and sizes["q_proj"] == 8
    with pytest.raises(ConfigurationError, match="train pattern 'nope' matches no parameter"):
        OftLayers(block_size=8, train=["nope"]).apply_(CausalLM(tiny_llama)())
    with pytest.raises(ConfigurationError, match="overrides pattern 'nope' matches none of the rotated layers"):
        OftLayers(block_size=8, overrides={"nope": {"block_size": 4}}).apply_(CausalLM(tiny_llama)())
    with pytest.raises(ConfigurationError, match=r"layer model.layers.0.self_attn.q_proj \(32 x 32\): block_size=12"):
        OftLayers(block_size=12).apply_(CausalLM(tiny_llama)())


def rows_of(batch):
    return DataLoader([batch] * 6, batch_size=None)


def test_a_network_with_its_own_loss(tmp_path):
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0
    )
    module = OftModule(
        LlamaForSequenceClassification(config),
        OftLayers(block_size=8, train=["*score*"]),
        Optimization(lr=1e-2),
        objective="model",
    )
    batch = {"input_ids": torch.randint(1, 64, (4, 8)), "labels": torch.tensor([0, 1, 0, 1])}
    trainer = trainer_for(tmp_path, max_epochs=6)
    trainer.fit(module, rows_of(batch), rows_of(batch))
    assert float(trainer.callback_metrics["val_token_accuracy"]) == 1.0


def test_sequence_to_sequence(tmp_path):
    config = BartConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=48, decoder_ffn_dim=48,
        encoder_attention_heads=2, decoder_attention_heads=2, vocab_size=64, max_position_embeddings=32,
    )  # fmt: skip
    module = OftModule(
        BartForConditionalGeneration(config),
        OftLayers(block_size=8, train=["*norm*"]),
        Optimization(lr=2e-2),
        objective="model",
    )
    batch = {"input_ids": torch.randint(4, 64, (4, 8)), "labels": torch.randint(4, 64, (4, 6))}
    before = trainer_for(tmp_path).validate(module, rows_of(batch), verbose=False)[0]["val_loss"]
    trainer = trainer_for(tmp_path, max_epochs=4)
    trainer.fit(module, rows_of(batch), rows_of(batch))
    assert float(trainer.callback_metrics["val_loss"]) < before - 0.01


def test_coft_keeps_its_bound_through_training(tiny_llama, tmp_path, instructions):
    layers = OftLayers(block_size=8, coft_eps=0.01)
    module = OftModule(CausalLM({**tiny_llama, "vocab_size": 320}), layers, Optimization(lr=1e-1), max_new_tokens=0)
    trainer = trainer_for(tmp_path, max_steps=5)
    trainer.fit(module, datamodule=instructions)
    assert any(isinstance(callback, ProjectGenerators) for callback in trainer.callbacks)
    for _, layer in mergeable_layers(module):
        (generators,) = layer.rotation_parameters()
        assert 0 < generators.norm() * 2**0.5 <= 0.01 * 1.0001


def test_a_model_that_transformers_has_quantized(tiny_llama, tmp_path, instructions):
    sizes = {"hidden_size": 128, "intermediate_size": 128, "vocab_size": 320}
    CausalLM({**tiny_llama, **sizes})().save_pretrained(tmp_path / "base")
    build = PretrainedModel(str(tmp_path / "base"), dtype="float32", load_in_4bit=True)
    module = OftModule(build, OftLayers(block_size=8), Optimization(lr=2e-2), max_new_tokens=0)
    module.configure_model()
    ids = torch.arange(16)[None]
    expected = build()(ids).logits
    torch.testing.assert_close(module(ids).logits, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    trainer = trainer_for(tmp_path, max_epochs=4)
    before = trainer_for(tmp_path).validate(module, datamodule=instructions, verbose=False)[0]["val_loss"]
    trainer.fit(module, datamodule=instructions)
    assert float(trainer.callback_metrics["val_loss"]) < before
