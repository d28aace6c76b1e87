"""A checkpoint with something else in the place of what a run restores ends in one line, in a real Trainer."""

import copy
import random

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn

from orthotrain.callbacks import OrthogonalityMonitor, SpectrumMonitor
from orthotrain.data import TextData
from orthotrain.errors import ConfigurationError
from orthotrain.models import CausalLM
from orthotrain.modules import Optimization, PoetLayers, PoetModule
from orthotrain.schedules import CosineWithWarmup

NETWORK = {
    "vocab_size": 320, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 32,
}  # fmt: skip


class Runs:
    """Runs of one small POET network on one small corpus, and the checkpoint of its fourth step."""

    def __init__(self, folder, corpus):
        self.folder, self.corpus = folder, corpus
        self.run("fit", 4)
        self.path = folder / "run" / "last.ckpt"
        self.checkpoint = torch.load(self.path, weights_only=True)

    def run(self, command, steps=6, ckpt_path=None, name="run"):
        schedule = Optimization(lr=1e-3, scheduler=lambda optimizer: CosineWithWarmup(optimizer, warmup_steps=2))
        module = PoetModule(CausalLM(NETWORK), PoetLayers(block_size=4), merge_every=2, optimization=schedule)
        data = TextData(
            str(self.corpus), vocab_size=320, sequence_length=16, batch_size=2, cache_dir=str(self.folder / "cache"),
            val_fraction=0.1, test_fraction=0.0,
        )  # fmt: skip
        save = ModelCheckpoint(
            self.folder / name, every_n_train_steps=2, save_last=True, monitor="train_loss", filename="{step}"
        )
        callbacks = [save, OrthogonalityMonitor(2), SpectrumMonitor(2), EarlyStopping("val_loss", patience=99)]
        trainer = L.Trainer(
            accelerator="cpu", max_steps=steps, logger=False, enable_progress_bar=False, enable_model_summary=False,
            limit_val_batches=1, val_check_interval=2, num_sanity_val_steps=0, callbacks=callbacks,
            default_root_dir=self.folder / name, log_every_n_steps=1,
        )  # fmt: skip
        torch.manual_seed(0)
        getattr(trainer, command)(module, data, ckpt_path=ckpt_path)
        return module

    def changed(self, change):
        """Write the checkpoint with a change, and return its path."""
        checkpoint = copy.deepcopy(self.checkpoint)
        change(checkpoint)
        path = self.folder / "changed.ckpt"
        torch.save(checkpoint, path)
        return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory, corpus):
    return Runs(tmp_path_factory.mktemp("restorable"), corpus)


def put(checkpoint, place, value):
    *outer, last = place
    for key in outer:
        checkpoint = checkpoint[key]
    if value is DROP:
        del checkpoint[last]
    else:
        checkpoint[last] = value


DROP = object()
VALUES = [DROP, None, "x", -1, 10**30, True, 1.5, [], {}, [["x"]], {"x": 1}, torch.ones(3), float("nan"), ("a",)]


def places(value, place=()):
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in inner:
        yield (*place, key)
        yield from places(child, (*place, key))


def attempt(runs, command, place, value):
    """Run with one value changed: it goes on, or ends in one line that is about the checkpoint."""
    path = runs.changed(lambda checkpoint: put(checkpoint, place, value))
    try:
        runs.run(command, ckpt_path=path, name="attempt")
    except ConfigurationError as error:
        assert "\n" not in str(error) and "checkpoint" in str(error) or "data" in str(error), error
        return True
    return False


def test_values_of_every_kind_in_every_place(runs):
    """A sample of the places of a checkpoint, each with a value of another kind."""
    generator = random.Random("places")
    skipped = ("hyper_parameters", "datamodule_hyper_parameters", "TextData")  # what restores these is tested elsewhere
    every = [place for place in places(runs.checkpoint) if place[0] not in skipped]
    chosen = [place for place in every if len(place) < 4] + [place for place in every if len(place) >= 4]
    refused = 0
    for place in generator.sample(chosen, 60):
        refused += attempt(runs, generator.choice(["fit", "fit", "validate"]), place, generator.choice(VALUES))
    assert refused > 20
