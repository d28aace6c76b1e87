"""Finetuning of an encoder-decoder in a real Trainer: its metrics by hand, its answers, its exports."""

import json
import math

import lightning as L
import pytest
import torch
from peft import PeftModel
from torch.nn import functional as F
from transformers import AutoModelForSeq2SeqLM, BartConfig, BartForConditionalGeneration

from orthotrain.adapters import export_peft, import_peft
from orthotrain.callbacks.sample_writer import SampleWriter
from orthotrain.data import InstructionData
from orthotrain.data.tokenizers import train_tokenizer
from orthotrain.errors import ConfigurationError
from orthotrain.export import export_huggingface
from orthotrain.layers import mergeable_layers
from orthotrain.models import CausalLM, PretrainedModel
from orthotrain.modules import OftLayers, OftModule, Optimization

WORDS = ("ab", "cdcd", "e", "ghghgh")
ROWS = [{"prompt": f"{n} say {word}", "response": word} for n, word in enumerate(WORDS * 12)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([f"{row['prompt']} {row['response']}" for row in ROWS], 262)


@pytest.fixture
def base(tmp_path, tokenizer):
    """A folder with a small BART."""
    torch.manual_seed(0)
    end = tokenizer.eos_token_id
    config = BartConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=262,
        encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=64, init_std=0.2, dropout=0.0,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=end, eos_token_id=end, decoder_start_token_id=end,
        forced_eos_token_id=None,
    )  # fmt: skip
    BartForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def make_data(tmp_path, tokenizer):
    def make(**changes):
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        options = {
            "layout": "seq2seq",
            "max_length": 32,
            "batch_size": 4,
            "val_fraction": 0.25,
            "generation_samples": 6,
        }
        return InstructionData(str(tmp_path / "tokenizer"), str(tmp_path / "rows.jsonl"), **{**options, **changes})

    return make


def make_module(base, lr=2e-2, **options):
    network = PretrainedModel(base, task="seq2seq_lm")
    layers = OftLayers(block_size=8, train=options.pop("train", []))
    return OftModule(network, layers, Optimization(lr=lr), **{"objective": "model", "max_new_tokens": 8, **options})


def trainer_for(folder, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return L.Trainer(accelerator="cpu", default_root_dir=folder, logger=False, **{**quiet, **options})


def test_the_rotations_learn_and_nothing_else_changes(base, make_data, tmp_path):
    module, data = make_module(base), make_data()
    before = trainer_for(tmp_path).validate(module, datamodule=data, verbose=False)[0]
    frozen = {name: tensor.clone() for name, tensor in module.model.state_dict().items()}
    trainer = trainer_for(tmp_path, max_epochs=4)
    trainer.fit(module, datamodule=data)
    metrics = trainer.callback_metrics
    assert float(metrics["val_loss"]) < before["val_loss"] - 0.5
    assert float(metrics["val_token_accuracy"]) > before["val_token_accuracy"]
    assert {"val_exact_match", "val_rouge_l"} <= set(metrics)
    changed = {n for n, tensor in module.model.state_dict().items() if not torch.equal(tensor, frozen[n])}
    assert changed == {name for name in frozen if name.endswith("generators")}


def test_metrics_are_those_of_every_response_token(base, make_data, tokenizer, tmp_path):
    """Against log-likelihoods of single rows, the decoder's inputs shifted here and not by the network."""
    module, data = make_module(base, max_new_tokens=0), make_data(batch_size=5)
    metrics = trainer_for(tmp_path).validate(module, datamodule=data, verbose=False)[0]
    module.eval()
    nats, right, tokens, widths = 0.0, 0, 0, set()
    for batch in data.val_dataloader():
        widths.add(batch["labels"].shape[1])
        for inputs, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            read, written = inputs[mask.bool()], labels[labels >= 0]
            assert written[-1] == tokenizer.eos_token_id
            decoder = torch.cat([torch.tensor([tokenizer.eos_token_id]), written[:-1]])
            with torch.no_grad():
                logits = module(input_ids=read[None], decoder_input_ids=decoder[None]).logits[0]
            nats += float(F.cross_entropy(logits, written, reduction="sum"))
            right += int((logits.argmax(-1) == written).sum())
            tokens += len(written)
    assert len(widths) > 1
    assert metrics["val_loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert metrics["val_perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert metrics["val_token_accuracy"] == pytest.approx(right / tokens)


def test_answers_are_whole_and_scored(base, make_data, tmp_path):
    """With everything trained the rows are learnt by heart, so a lost or added token of an answer would show."""
    data = make_data(val_source=str(tmp_path / "rows.jsonl"))
    module = make_module(base, 3e-3, train=["*"])
    trainer = trainer_for(tmp_path, max_epochs=16, check_val_every_n_epoch=16, callbacks=[SampleWriter()])
    trainer.fit(module, datamodule=data)
    assert float(trainer.callback_metrics["val_exact_match"]) == 1.0
    assert float(trainer.callback_metrics["val_rouge_l"]) == 1.0
    assert "0 say ab\n>>> ab\n=== ab\n---\n" in (tmp_path / "val_samples.txt").read_text()
    trainer.predict(module, datamodule=data)
    samples = [json.loads(line) for line in (tmp_path / "samples-0.jsonl").read_text().splitlines()]
    assert len(samples) == 6
    right = [row for row in samples if row["prompt"].endswith(f" say {row['continuation']}")]
    assert len(right) >= 4, "answers are sampled, but the network is sure"


def test_what_does_not_fit_together_is_refused(base, make_data, tmp_path, tiny_llama):
    with pytest.raises(ConfigurationError, match=r"layout 'causal' does not fit BartFor.*set layout to seq2seq"):
        trainer_for(tmp_path).validate(make_module(base), datamodule=make_data(layout="causal"))
    llama = OftModule(CausalLM({**tiny_llama, "vocab_size": 262}), OftLayers(block_size=8))
    with pytest.raises(
        ConfigurationError, match=r"layout 'seq2seq' does not fit LlamaForCausalLM.*set layout to causal"
    ):
        trainer_for(tmp_path).validate(llama, datamodule=make_data())
    with pytest.raises(ConfigurationError, match=r"objective='next_token': BartForConditionalGeneration.*to model"):
        trainer_for(tmp_path).validate(make_module(base, objective="next_token"), datamodule=make_data())


def logits_of(network, batch):
    with torch.no_grad():
        return network.eval()(**batch).logits


def test_exports_compute_what_the_run_computed(base, make_data, tmp_path, tokenizer):
    module, data = make_module(base), make_data()
    trainer_for(tmp_path, max_steps=8, limit_val_batches=0).fit(module, datamodule=data)
    batch = next(iter(data.train_dataloader()))
    expected = logits_of(module.model, batch)
    plain = AutoModelForSeq2SeqLM.from_pretrained(base)
    assert (logits_of(plain, batch) - expected).abs().max() > 1e-2
    close = {"rtol": 1e-5, "atol": 1e-5 * float(expected.abs().max())}

    folder = export_peft(module.model, tmp_path / "adapter")
    adapted = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(base), folder)
    assert adapted.peft_config["default"].task_type == "SEQ_2_SEQ_LM"
    torch.testing.assert_close(logits_of(adapted, batch), expected, **close)
    assert import_peft(plain, folder) == [name for name, _ in mergeable_layers(module.model)]
    torch.testing.assert_close(logits_of(plain, batch), expected, **close)

    export_huggingface(module.model, tmp_path / "merged", tokenizer)
    merged = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(merged, batch), expected, **close)
