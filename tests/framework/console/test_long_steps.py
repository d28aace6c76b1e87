"""Every step that takes long with a large network or corpus counts what it does, all of it, and shows it."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch

import orthotrain.console.progress
from orthotrain.adapters import AdapterSet, export_peft, import_peft
from orthotrain.checkpoints.shards import save_shards
from orthotrain.cli.calibrate import calibrate
from orthotrain.console.progress import Progress, bytes_in
from orthotrain.data import InstructionData, TextData
from orthotrain.data.corpus.sources import open_corpus
from orthotrain.data.instructions.sources import count_rows
from orthotrain.export import export_huggingface
from orthotrain.layers.replacement import unwrap_mergeables
from orthotrain.models import CausalLM, PretrainedModel
from orthotrain.modules import OftLayers


@pytest.fixture
def ended(monkeypatch):
    """What -> its progress at the end of the step."""
    steps = {}
    close = Progress.close

    def note(self):
        close(self)
        if self.watch is not None:
            self.done = self.watch()
        steps[self.what] = self

    monkeypatch.setattr(Progress, "close", note)
    return steps


@pytest.fixture
def base(tiny_llama, tmp_path):
    CausalLM(tiny_llama)().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def test_text_is_counted_in_bytes_to_the_last_and_in_tokens(ended, corpus, tmp_path):
    data = TextData(
        str(corpus), vocab_size=300, cache_dir=str(tmp_path), sequence_length=32, val_fraction=0.2, test_fraction=0.2
    )
    data.prepare_data()
    tokenizing = ended["tokenizing"]
    assert tokenizing.done == tokenizing.total == open_corpus(str(corpus)).size()
    data.setup()
    tokens = sum(data._cache(split).metadata.tokens for split in ("train", "val", "test"))
    assert tokenizing.tokens == tokens and "tokens/s" in tokenizing.text()
    assert "learning 300 tokens" in ended


def test_text_without_an_end_has_a_rate(ended, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("orthotrain.data.corpus.sources.Files.size", lambda self: None)
    TextData(str(corpus), vocab_size=300, cache_dir=str(tmp_path)).prepare_data()
    assert ended["tokenizing"].total is None and " MB in 0:0" in ended["tokenizing"].text()


def test_rows_are_counted_before_they_are_read_where_that_is_quick(ended, tmp_path, corpus):
    lines = [json.dumps({"prompt": f"p{n}", "response": f"r{n}"}) for n in range(7)]
    (tmp_path / "rows.jsonl").write_text("\n\n".join(lines) + "\n \n")
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["p"] * 5}), tmp_path / "rows.parquet")
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.write(lines[0])
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1")
    (tmp_path / "rows.json").write_text("[]")
    counts = [count_rows(str(tmp_path / name)) for name in ("rows.jsonl", "rows.parquet", "rows.jsonl.gz", "rows.json")]
    assert counts == [7, 5, None, None]
    assert count_rows([str(tmp_path / "rows.jsonl"), str(tmp_path / "rows.parquet")]) == 12
    assert count_rows(str(tmp_path / "damaged.parquet")) is None
    unknown = ["python-stdlib-docstrings", "org/name", str(tmp_path / "rows.json")]
    assert [count_rows([str(tmp_path / "rows.jsonl"), name]) for name in unknown] == [None] * 3

    data = TextData(str(corpus), vocab_size=300, cache_dir=str(tmp_path / "cache"))
    data.prepare_data()
    data.tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = InstructionData(str(tmp_path / "tokenizer"), str(tmp_path / "rows.jsonl"), batch_size=1, val_fraction=0.0)
    rows.setup("fit")
    step = ended["tokenizing"]
    assert step.done == step.total == 7 and step.unit == "rows" and step.tokens > 14


def test_loading_wrapping_merging_and_writing_a_model(ended, base, tmp_path, capfd):
    network = PretrainedModel(base)()
    tensors = len(network.state_dict())
    assert ended["loading the model"].done == ended["loading the model"].total == tensors
    OftLayers(block_size=8).apply_(network)
    assert ended["wrapping"].done == ended["wrapping"].total == 14
    export_huggingface(network, tmp_path / "merged")
    assert ended["merging"].done == ended["merging"].total == 14
    written = bytes_in(tmp_path / "merged" / "model.safetensors")
    assert ended["writing the model"].total == pytest.approx(written, rel=0.03)
    said = capfd.readouterr()
    assert said.out == "" and "%|" not in said.err, "the bars of libraries are no lines of a log"


def test_writing_is_watched_while_it_goes_on(ended, base, tmp_path, monkeypatch):
    network, seen = PretrainedModel(base)(), []

    def save(folder):
        (folder / "weights").write_bytes(bytes(1000))
        seen.append(orthotrain.console.progress._RUNNING[-1].watch())

    monkeypatch.setattr(network, "save_pretrained", save)
    export_huggingface(network, tmp_path / "merged")
    assert seen == [1000]


def test_adapters(ended, base, tmp_path):
    network = PretrainedModel(base)()
    OftLayers(block_size=8).apply_(network)
    export_peft(network, tmp_path / "adapter")
    generators = sum(p.nbytes for name, p in network.named_parameters() if name.endswith("generators"))
    assert ended["writing the adapter"].total == generators
    ended.clear()
    import_peft(PretrainedModel(base)(), tmp_path / "adapter")
    assert ended["wrapping"].done == ended["wrapping"].total == 14
    AdapterSet(network).merge("default")
    assert ended["merging"].done == ended["merging"].total == 14
    assert len(unwrap_mergeables(network)) == 14


def test_calibrating_counts_its_rounds(ended):
    calibrate(torch.device("cpu"), shapes=[(16, 32, 8), (8, 32, 8)], rounds=1)
    step = ended["measuring"]
    assert step.done == step.total == 8
    assert step.watch is None, "a thread beside it would be measured too"


def test_consolidating_counts_bytes_and_its_command_says_what_it_takes(ended, tmp_path):
    weights = {"state_dict": {"w": torch.randn(1000), "v": torch.randn(500)}}
    save_shards(weights, {"optimizer_states": []}, tmp_path / "shards.ckpt", bool)
    from orthotrain.distributed.consolidate import consolidate

    consolidate(tmp_path / "shards.ckpt", tmp_path / "one.ckpt")
    checked, read = ended["checking the shards"], ended["reading the shards"]
    assert 6000 < checked.done <= checked.total and read.done == 6000 and "writing the checkpoint" in ended

    def command(*arguments):
        line = [Path(sys.executable).with_name("orthotrain"), "consolidate", *map(str, arguments)]
        return subprocess.run(line, capture_output=True, text=True, cwd=tmp_path)

    helped, without = command("--help"), command("shards.ckpt")
    assert helped.returncode == 0 and "FOLDER FILE" in helped.stdout and helped.stderr == ""
    assert without.returncode == 2 and without.stderr.count("\n") == 1 and "required: FILE" in without.stderr
    done = command("shards.ckpt", "two.ckpt")
    assert (done.stdout, done.stderr) == ("wrote two.ckpt\n", "")
