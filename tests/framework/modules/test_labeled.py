"""A BERT trained on labels from YAML, exported and read again; its metrics against those of all rows at once."""

import json

import pytest
import torch
import yaml
from lightning import Trainer
from sklearn.metrics import f1_score
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

from orthotrain.cli.main import main
from orthotrain.data import LabeledData
from orthotrain.errors import ConfigurationError
from orthotrain.models import CausalLM, PretrainedModel
from orthotrain.modules import OftLayers, OftModule, Optimization, PoetLayers, PoetModule

NAMES = ["bad", "fair", "good"]
TEXT = [{"text": f"{'a ' * (n % 5)}{NAMES[n % 3]} film", "label": NAMES[n % 3]} for n in range(30)]
WORDS = [{"text": ["a", NAMES[n % 3], "film"], "label": ["O", NAMES[n % 3], "O"]} for n in range(30)]
NUMBERS = [{"text": row["text"], "label": -100 if n == 5 else n % 3 - 1.5} for n, row in enumerate(TEXT)]
ROWS = {"sequence_classification": TEXT, "token_classification": WORDS, "regression": NUMBERS}


@pytest.fixture
def make_data(tiny_bert, tmp_path):
    def make(task="sequence_classification", **options):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, ROWS[task])))
        given = {"task": task, "max_length": 16, "batch_size": 4, "val_fraction": 0.0, "val_source": str(path)}
        return LabeledData(str(tiny_bert), str(path), **given | options)

    return make


def trainer_for(folder, **options):
    given = {"max_steps": 2, "num_sanity_val_steps": 0, "val_check_interval": 2, "check_val_every_n_epoch": None}
    return Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, **given | options,
    )  # fmt: skip


def head_of(task):
    return "sequence_classification" if task == "regression" else task


METHODS = {
    "oft": ("OftModule", {"layers": {"block_size": 8}}),
    "poet": ("PoetModule", {"layers": {"block_size": 8, "init": "keep", "exclude": ["*classifier"]}, "merge_every": 2}),
}


@pytest.mark.parametrize(
    ("method", "task"),
    [("poet", "sequence_classification"), ("oft", "token_classification")],
)
def test_from_yaml_to_an_exported_folder(tiny_bert, make_data, tmp_path, method, task, capsys):
    source = make_data(task).hparams["source"]
    module, arguments = METHODS[method]
    network = {"name": str(tiny_bert), "task": head_of(task)}
    config = {
        "trainer": {"accelerator": "cpu", "max_steps": 4, "max_epochs": None, "precision": "32-true"}
        | {"logger": False, "enable_progress_bar": False},
        "checkpoint": {"every_n_train_steps": 4},
        "report": {"spectrum_layers": 0},
        "model": {
            "class_path": module,
            "init_args": {
                "model": {"class_path": "PretrainedModel", "init_args": network},
                "optimization": {"lr": 1e-2},
                **arguments,
            },
        },
        "data": {
            "class_path": "LabeledData",
            "init_args": {"tokenizer": str(tiny_bert), "source": source, "val_source": source, "task": task}
            | {"max_length": 16, "batch_size": 4, "text_column": "text"},
        },
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    run, out = tmp_path / "run", tmp_path / "out"
    command = ["-c", "finetune/classification.yaml", "-c", str(tmp_path / "mine.yaml"), "--run_folder", str(run)]
    main(["fit", *command])
    printed = capsys.readouterr().out
    assert "validation f1 macro" in printed and "validation accuracy" in printed and "perplexity" not in printed
    summary = json.loads((run / "summary.json").read_text())
    assert summary["data"]["train"]["rows"] == 30 and len(summary["curves"]["val_loss"]) == 4
    main(["validate", *command, "--ckpt_path", "last"])
    main(["export", "--ckpt", str(run / "checkpoints" / "last.ckpt"), "--out", str(out)])
    kind = AutoModelForTokenClassification if task == "token_classification" else AutoModelForSequenceClassification
    loaded, tokenizer = kind.from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out)
    names = ["O", *NAMES] if task == "token_classification" else NAMES
    assert list(loaded.config.id2label.values()) == sorted(names) and loaded.config.num_labels == len(names)
    assert loaded.config.label2id["bad"] == sorted(names).index("bad")

    kind = {"OftModule": OftModule, "PoetModule": PoetModule}[module]
    module = kind.load_from_checkpoint(run / "checkpoints" / "last.ckpt")
    inputs = tokenizer("a good film", return_tensors="pt")
    assert inputs["input_ids"].tolist() == AutoTokenizer.from_pretrained(tiny_bert)(["a good film"])["input_ids"]
    with torch.no_grad():
        expected = module.model.eval()(**inputs).logits
        torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=1e-5, atol=1e-5)


def all_logits(module, data):
    """Return logits and labels of all validation rows, each computed alone."""
    batches = [data._dataset("val")[[row]] for row in range(30)]
    network = module.model.eval()
    with torch.no_grad():
        outputs = [network(**batch).logits.reshape(-1, network.config.num_labels) for batch in batches]
    return torch.cat(outputs), torch.cat([batch["labels"].flatten() for batch in batches])


@pytest.mark.parametrize("task", ROWS)
def test_metrics_are_those_of_all_rows_whatever_the_batches(make_data, tiny_bert, tmp_path, task):
    torch.manual_seed(0)
    builder = PretrainedModel(str(tiny_bert), task=head_of(task))
    module, data = OftModule(builder, OftLayers(block_size=8), Optimization(lr=2e-2)), make_data(task, batch_size=7)
    trainer = trainer_for(tmp_path, max_steps=8)
    trainer.fit(module, data)
    found = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val_")}
    logits, labels = all_logits(module, data)
    if task == "regression":
        assert set(found) == {"val_loss", "val_mse", "val_pearson", "val_spearman"}
        pearson = float(torch.corrcoef(torch.stack([logits.flatten(), labels]))[0, 1])
        mse = float((logits.flatten() - labels).square().mean())
        assert found["val_mse"] == pytest.approx(mse, 1e-4) and found["val_loss"] == pytest.approx(mse, 1e-4)
        assert found["val_pearson"] == pytest.approx(pearson, abs=2e-3)
        return
    counted = labels != -100
    predicted, labels = logits.argmax(-1)[counted], labels[counted]
    loss = float(nn.functional.cross_entropy(logits[counted], labels))
    assert set(found) == {"val_loss", "val_accuracy", "val_f1_macro"} and found["val_loss"] == pytest.approx(loss, 1e-4)
    assert found["val_accuracy"] == pytest.approx(float((predicted == labels).float().mean()), abs=1e-6)
    assert found["val_f1_macro"] == pytest.approx(f1_score(labels, predicted, average="macro"), abs=1e-6)
    assert found["val_accuracy"] > 0.3, "it has learned something"


def test_a_network_that_does_not_fit_the_labels_is_refused(make_data, tiny_bert, tiny_llama, tmp_path):
    def refused(model, message, module=None, **options):
        with pytest.raises(ConfigurationError, match=message):
            trainer_for(tmp_path).fit(module or OftModule(model, OftLayers(block_size=8)), make_data(**options))

    bert = str(tiny_bert)
    refused(PretrainedModel(bert, "token_classification"), "set the model's task to sequence_classification")
    refused(CausalLM(tiny_llama), "LlamaForCausalLM has no head for task 'sequence_classification'")
    wrong = PretrainedModel(bert, "sequence_classification", options={"num_labels": 5})
    refused(wrong, "options: num_labels=5, and the data's labels need 3: leave num_labels out")
    built = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
    poet = PoetModule(built, PoetLayers(block_size=8, init="keep", exclude=["*classifier"]))
    refused(None, "BertForSequenceClassification has 2 outputs, and the data has 3 classes", poet)
    head = PretrainedModel(bert, "sequence_classification")
    refused(head, "max_length 65 is more than the 64 positions of Bert", max_length=65)
    other = PretrainedModel(bert, "sequence_classification", options={"pad_token_id": 3})
    refused(other, "the tokenizer pads with token 0, and the network takes token 3 for padding")


def test_a_decoder_learns_where_a_row_ends(make_data, tiny_llama, tmp_path):
    tokens = {**tiny_llama, "pad_token_id": None, "num_labels": 3}
    config = type(CausalLM(tiny_llama)().config)(**tokens)
    network = AutoModelForSequenceClassification.from_config(config)
    trainer_for(tmp_path).fit(OftModule(network, OftLayers(block_size=8, train=["score*"])), make_data())
    assert network.config.pad_token_id == 0 and network.config.id2label == {0: "bad", 1: "fair", 2: "good"}
