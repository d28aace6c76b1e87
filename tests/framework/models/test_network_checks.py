"""What the data asks of a network, and what its labels mean: refused by name, or computed right."""

import json
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MarianConfig,
    MistralConfig,
    MistralForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
    XLMConfig,
)

from orthotrain.data import InstructionData
from orthotrain.data.tokenizers import train_tokenizer
from orthotrain.errors import ConfigurationError
from orthotrain.models.network_checks import check_attention, check_sequence_length, shifts_labels, with_usable_mask
from orthotrain.modules import OftLayers, OftModule, Optimization, PoetLayers, PoetModule

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
ROBERTA = RobertaConfig(**SIZES, vocab_size=262, is_decoder=True, pad_token_id=1)
ROWS = [{"prompt": f"{i} say {word}", "response": word * (1 + i % 4)} for i, word in enumerate(("ab", "cd", "ef") * 12)]


@pytest.fixture
def data(tmp_path):
    """Returns a function that builds the data module."""
    tokenizer = train_tokenizer([f"{row['prompt']} {row['response']}" for row in ROWS], 262)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))

    def build(**options):
        options = {"max_length": 48, "batch_size": 4, "val_fraction": 0.3, "generation_samples": 2, **options}
        return InstructionData(str(tmp_path / "tokenizer"), str(tmp_path / "rows.jsonl"), **options)

    return build


def llama(**options):
    return LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=262, initializer_range=0.3, **options))


def bart():
    config = BartConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=262,
        encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return BartForConditionalGeneration(config)


def trainer_for(folder):
    return L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_steps=2,
        enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip


def module_of(network, **options):
    options = {"max_new_tokens": 0, **options}
    return OftModule(network, OftLayers(block_size=8), Optimization(lr=1e-2), **options)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_rows_are_as_if_alone(data, attention, dtype):
    data = data(packing=True)
    data.setup("fit")
    module = module_of(llama(attn_implementation=attention).to(dtype).eval())
    module.configure_model()
    dataset = data._dataset("train")
    batch = dataset[list(range(len(dataset)))]
    assert max(map(len, dataset.packs)) > 1
    with torch.no_grad():
        _, packed = module.outputs(batch)
        for number, members in enumerate(dataset.packs):
            start = 0
            for row in members:
                tokens = torch.from_numpy(dataset.rows.inputs_and_labels(row)[0])
                alone = module(tokens[None]).logits[0]
                tolerance = 1e-5 if dtype == torch.float32 else 6e-2
                span = slice(start, start + len(tokens))
                torch.testing.assert_close(packed[number, span], alone, rtol=tolerance, atol=tolerance)
                start += len(tokens)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_train(data, attention, tmp_path):
    trainer = trainer_for(tmp_path)
    trainer.fit(module_of(llama(attn_implementation=attention)), datamodule=data(packing=True))
    assert float(trainer.callback_metrics["val_loss"]) > 0


def test_bool_masks_of_padding_stay():
    batch = {"attention_mask": torch.ones(2, 3, dtype=torch.bool)}
    assert with_usable_mask(batch, llama(attn_implementation="eager")) is batch


def test_packing_is_refused_for_other_attention(data, tmp_path):
    network = llama()
    network.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ConfigurationError, match="packing with attn_implementation='flash_attention_2'.*sdpa or eager"):
        trainer_for(tmp_path).fit(module_of(network), datamodule=data(packing=True))
    check_attention(nn.Linear(2, 2), SimpleNamespace(argument="max_length", tokens=9))


def test_packing_is_refused_for_rows_longer_than_a_window(data, tmp_path):
    network = MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=2, vocab_size=262, sliding_window=47))
    message = (
        r"max_length 48: layers of MistralForCausalLM see the last 47 .*sliding_window.*packing to false, or max_len"
    )
    with pytest.raises(ConfigurationError, match=message):
        trainer_for(tmp_path).fit(module_of(network), datamodule=data(packing=True))
    longest = SimpleNamespace(argument="max_length", tokens=48)
    for config in (
        {"sliding_window": 48},
        {"sliding_window": None},
        {"sliding_window": 8, "use_sliding_window": False},
        {"sliding_window": 8, "layer_types": ["full_attention"]},
    ):
        network.config = SimpleNamespace(**config)
        check_attention(network, longest)
    network.config = SimpleNamespace(text_config=SimpleNamespace(attention_chunk_size=8))
    with pytest.raises(ConfigurationError, match="last 8 tokens alone .attention_chunk_size"):
        check_attention(network, longest)


def test_rows_longer_than_the_network_are_refused(data, tmp_path):
    trainer = trainer_for(tmp_path)
    with pytest.raises(ConfigurationError, match="max_length 65 is more than the 64 positions of LlamaForCausalLM"):
        trainer.fit(module_of(llama()), datamodule=data(max_length=65))
    options = {"layout": "seq2seq", "max_length": 64, "max_response_length": 100}
    with pytest.raises(ConfigurationError, match=r"max_response_length 100 is more than the 64 .*to at most 64"):
        trainer_for(tmp_path).fit(module_of(bart(), objective="model"), datamodule=data(**options))
    trainer_for(tmp_path).validate(module_of(llama()), datamodule=data(max_length=64), verbose=False)


@pytest.mark.parametrize(("network", "most"), [(llama, 64), (lambda: RobertaForCausalLM(ROBERTA), 62)])
def test_sequences_longer_than_the_network_are_refused(network, most):
    module = PoetModule(network(), PoetLayers(block_size=4), optimization=Optimization(lr=1e-2))
    module._trainer = SimpleNamespace(datamodule=SimpleNamespace(sequence_length=most + 1), strategy=None)
    with pytest.raises(ConfigurationError, match=f"sequence_length {most + 1} is more than the {most} positions of"):
        module.configure_model()
    check_sequence_length(SimpleNamespace(sequence_length=most), module.model)
    check_sequence_length(None, module.model)
    check_sequence_length(SimpleNamespace(sequence_length=99), nn.Linear(2, 2))
    with torch.no_grad():
        module.model.eval()(torch.full((1, most), 4))


def metrics_of(network, batch, folder):
    module, rows = module_of(network, objective="model"), DataLoader([batch] * 2, batch_size=None)
    trainer = trainer_for(folder)
    trainer.fit(module, rows, rows)
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val")}


IDS = torch.arange(4, 28).view(2, 12)
BERT = {**SIZES, "vocab_size": 64}
UNCOUNTED = {
    "several labels": (
        lambda: BertForSequenceClassification(
            BertConfig(**BERT, num_labels=3, problem_type="multi_label_classification")
        ),
        {"labels": torch.tensor([[1.0, 0, 0], [1, 1, 0]])},
    ),
    "regression": (
        lambda: BertForSequenceClassification(BertConfig(**BERT, num_labels=1)),
        {"labels": torch.tensor([0.5, -1.0])},
    ),
    "no logits": (
        lambda: BertForQuestionAnswering(BertConfig(**BERT)),
        {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])},
    ),
}


@pytest.mark.parametrize("task", UNCOUNTED)
def test_heads_without_classes_have_a_loss_and_no_accuracy(task, tmp_path):
    build, labels = UNCOUNTED[task]
    metrics = metrics_of(build(), {"input_ids": IDS, **labels}, tmp_path)
    assert set(metrics) == {"val_loss"} and metrics["val_loss"] > 0


def test_classes_of_tokens_are_counted(tmp_path):
    network = BertForTokenClassification(BertConfig(**BERT, num_labels=3))
    metrics = metrics_of(network, {"input_ids": IDS, "labels": IDS % 3}, tmp_path)
    assert 0 <= metrics["val_token_accuracy"] <= 1


def test_a_causal_lms_own_loss_is_compared_with_shifted_labels(tmp_path):
    """A network that always predicts the token after its input is right everywhere, its labels not shifted."""
    network = LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_hidden_layers": 0}, vocab_size=32))
    with torch.no_grad():
        network.model.embed_tokens.weight.copy_(torch.eye(32))
        network.lm_head.weight.copy_(torch.eye(32).roll(1, 0))
    ids = torch.arange(24).view(2, 12)
    module = OftModule(network, max_new_tokens=0, objective="model")
    batch = {"input_ids": ids, "labels": torch.where(ids == 0, -100, ids)}
    loss, logits = module.outputs(batch)
    labels = module.targets(batch)
    assert labels.shape == logits.shape[:-1] == (2, 11)
    assert (logits.argmax(-1) == labels).all()
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))


def test_which_networks_shift_their_labels():
    assert shifts_labels(llama())
    assert shifts_labels(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=8)))
    assert not shifts_labels(bart())
    sizes = {"n_layers": 1, "n_heads": 2, "decoder_layers": 1, "decoder_attention_heads": 2, "vocab_size": 8}
    labels = torch.arange(1, 7)[None]
    for config in (
        MarianConfig(**sizes, d_model=8, decoder_ffn_dim=8, pad_token_id=0, decoder_start_token_id=0),
        XLMConfig(**sizes, emb_dim=8),
    ):
        network = AutoModelForCausalLM.from_config(config).eval()
        output = network(input_ids=labels, labels=labels)
        torch.testing.assert_close(output.loss, nn.functional.cross_entropy(output.logits[0], labels[0]))
        assert not shifts_labels(network)
    assert not shifts_labels(BertForTokenClassification(BertConfig(**BERT)))
    assert not shifts_labels(nn.Linear(2, 2)) and not shifts_labels(None)
