"""A run goes on with the data that it began with; other data is refused with the difference, or allowed by name."""

import functools
import json
import os
import shutil

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from orthotrain.data import InstructionData, TextData
from orthotrain.data.tokenizers import train_tokenizer
from orthotrain.errors import ConfigurationError

TEXTS = [f"row {number} of the quick brown fox and the lazy dog " * 4 for number in range(60)]


class Recorder(L.LightningModule):
    """Learns nothing."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch, index):
        return self.weight.sum()

    def validation_step(self, batch, index):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder=None, steps=3):
    callbacks = [ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")] if folder else []
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return L.Trainer(
        accelerator="cpu", max_steps=steps, callbacks=callbacks, enable_checkpointing=bool(folder), **quiet
    )


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text, "prompt": text[:9], "response": text}) + "\n" for text in texts))
    os.utime(path, (1, 1))
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, 270).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=["text", "stream", "instructions", "packed"])
def kind(request, tmp_path_factory):
    """A kind of data, and a folder for what the tests of this kind share."""
    return request.param, tmp_path_factory.mktemp(request.param)


@pytest.fixture(scope="module")
def make_in(kind, tokenizer):
    def build(folder, source, cache="cache", **changes):
        common = {"source": str(source), "tokenizer": tokenizer, "batch_size": 2, "val_fraction": 0.1} | changes
        if kind[0] in ("text", "stream"):
            sizes = {"vocab_size": 270, "sequence_length": 32, "test_fraction": 0.0}
            return TextData(**sizes, streaming=kind[0] == "stream", cache_dir=str(folder / cache), **common)
        return InstructionData(max_length=300, packing=kind[0] == "packed", **common)

    return build


def resume(data, checkpoint, steps=5):
    run = trainer(steps=steps)
    run.fit(Recorder(), data, ckpt_path=checkpoint)
    return run.global_step


@pytest.fixture
def make(make_in, tmp_path):
    return functools.partial(make_in, tmp_path)


@pytest.fixture(scope="module")
def first_run(make_in, kind):
    """The source and the checkpoint of a run, which are made once."""
    _, folder = kind
    source = write(folder / "rows.jsonl", TEXTS)
    trainer(folder / "run").fit(Recorder(), make_in(folder, source))
    return source, folder / "run" / "step=2.ckpt"


@pytest.fixture
def begun(first_run, tmp_path):
    """The source with its first content, and a copy of the checkpoint."""
    source, checkpoint = first_run
    return write(source, TEXTS), str(shutil.copy(checkpoint, tmp_path / "begun.ckpt"))


CHANGES = {
    "order": lambda texts: [*texts[1:], texts[0]],
    "content": lambda texts: [text.replace("fox", "fix") for text in texts],
    "fewer": lambda texts: texts[:50],
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_rows_are_refused_or_allowed_by_name(make, begun, tmp_path, change):
    source, checkpoint = begun
    size, changed = source.stat().st_size, CHANGES[change](TEXTS)
    write(source, changed)
    assert source.stat().st_size == size or change == "fewer", "the same size and time, at the same place"
    with pytest.raises(ConfigurationError, match="the training data differs from the checkpoint's: ") as caught:
        resume(make(source, "other"), checkpoint)
    said = str(caught.value)
    assert "\n" not in said and "--data.allow_changed true" in said
    assert "with other content or in another order" in said or change != "order"
    assert resume(make(source, "other", allow_changed=True), checkpoint) == 5
    trainer().validate(Recorder(), make(source, "other"), ckpt_path=checkpoint, verbose=False)


def test_the_same_rows_elsewhere_are_the_same_data(make, begun, tmp_path):
    source, checkpoint = begun
    (tmp_path / "moved").mkdir()
    moved = shutil.copy(source, tmp_path / "moved" / "other_name.jsonl")
    assert resume(make(moved, "third"), checkpoint) == 5


def test_a_changed_copy_elsewhere_is_said_to_differ_in_content(make, begun, tmp_path):
    source, checkpoint = begun
    copy = tmp_path / "copy.jsonl"
    write(copy, [TEXTS[0].replace("fox", "fix", 1), *TEXTS[1:]])
    with pytest.raises(ConfigurationError, match="the training data differs from the checkpoint's: ") as caught:
        resume(make(copy, "changed copy"), checkpoint)
    said = str(caught.value)
    assert (
        "other content" in said and f"the source has another name too: {source} in the checkpoint, {copy} here" in said
    )


def test_other_settings_are_named(make, begun):
    source, checkpoint = begun
    with pytest.raises(ConfigurationError, match=r"val_fraction 0.1 in the checkpoint, 0.5 here"):
        resume(make(source, val_fraction=0.5), checkpoint)


def test_another_tokenizer_is_refused_or_allowed_by_name(make, begun, tmp_path):
    source, checkpoint = begun
    train_tokenizer(TEXTS, 266).save_pretrained(tmp_path / "other")
    other = {"tokenizer": str(tmp_path / "other")}
    with pytest.raises(ConfigurationError, match=r"tokenizer of this run .* differs .*allow_changed"):
        resume(make(source, **other), checkpoint)
    assert resume(make(source, allow_changed=True, **other), checkpoint) == 5


def test_a_shorter_epoch_is_gone_through_from_the_place_on(make, tmp_path):
    source = write(tmp_path / "rows.jsonl", TEXTS)
    trainer(tmp_path / "run", steps=20).fit(Recorder(), make(source))
    write(source, TEXTS[:20])
    data = make(source, "other", allow_changed=True)
    assert resume(data, str(tmp_path / "run" / "step=18.ckpt"), steps=40) == 40


@pytest.mark.parametrize("place", [5, [], {}, {"epoch": "a", "batches": 1}, {"batches": -1}, None])
def test_a_damaged_place_is_one_line(make, begun, tmp_path, place):
    source, path = begun
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] = [place]
    torch.save(checkpoint, path)
    with pytest.raises(ConfigurationError, match=r"the checkpoint('s state of the training data is damaged| holds no)"):
        resume(make(source), path)


@pytest.mark.parametrize(
    "state",
    [5, "x", [1], {"settings": 3}, {"special_tokens": []}, {"tokenizer_fingerprint": None}, {"chat_template": 1}],
)
def test_a_damaged_data_state_is_one_line(make, begun, state):
    source, path = begun
    checkpoint = torch.load(path, weights_only=True)
    name = "InstructionData" if "InstructionData" in checkpoint else "TextData"
    checkpoint[name] = {**checkpoint[name], **state} if isinstance(state, dict) else state
    torch.save(checkpoint, path)
    with pytest.raises(ConfigurationError, match="the checkpoint's data state is damaged"):
        resume(make(source), path)
