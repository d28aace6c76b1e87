"""A checkpoint with something else in the place of what a run restores ends in one line, in a real Trainer."""

import copy
import random

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

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
        assert "\n" not in str(error) and ("checkpoint" in str(error) or "data" in str(error)), error
        return True
    return False


def test_values_of_every_kind_in_every_place(runs):
    """A sample of the places of a checkpoint, each with a value of another kind."""
    generator = random.Random("places")
    skipped = ("hyper_parameters", "datamodule_hyper_parameters", "TextData")  # what restores these is tested elsewhere
    every = [place for place in places(runs.checkpoint) if place[0] not in skipped]
    chosen = [place for place in every if len(place) < 4] + [place for place in every if len(place) >= 4]
    refused = 0
    for place in generator.sample(chosen, 24):
        refused += attempt(runs, generator.choice(["fit", "fit", "validate"]), place, generator.choice(VALUES))
    assert refused > 6


def group(checkpoint):
    return checkpoint["optimizer_states"][0]["param_groups"][0]


def moments(checkpoint):
    return next(iter(checkpoint["optimizer_states"][0]["state"].values()))


LOOP = "epoch_loop.automatic_optimization.optim_progress"
CASES = {
    "no version": (lambda c: c.pop("pytorch-lightning_version"), "pytorch-lightning_version is None, not a version"),
    "version": (lambda c: c.update({"pytorch-lightning_version": "x"}), "is 'x', not a version"),
    "negative step": (lambda c: c.update(global_step=-1), "global_step is -1, not a count"),
    "epoch": (lambda c: c.update(epoch="1"), "epoch is '1', not a count"),
    "network": (lambda c: c.update(state_dict=[1]), "state_dict is a list, not a dictionary"),
    "weight": (lambda c: c["state_dict"].update({next(iter(c["state_dict"])): "x"}), "is a str, not a tensor"),
    "dtype": (
        lambda c: c["state_dict"].update({n: t.long() for n, t in c["state_dict"].items()}), "shapes differ .*int64"),
    "loops": (lambda c: c.update(loops="x"), "loops is a str, not a dictionary"),
    "no loop": (lambda c: c["loops"].pop("fit_loop"), "loops.fit_loop is missing"),
    "no progress": (lambda c: c["loops"]["fit_loop"].pop(LOOP), f"loops.fit_loop has no {LOOP}"),
    "counter": (
        lambda c: c["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"].update(ready="x"),
        "current.ready is 'x'"),
    "negative counter": (
        lambda c: c["loops"]["fit_loop"]["epoch_progress"]["current"].update(completed=-3), "current.completed is -3"),
    "no optimizers": (lambda c: c.pop("optimizer_states"), "it has no optimizer_states"),
    "optimizers": (lambda c: c["optimizer_states"].append({}), "it has 2 optimizer_states and this run has 1"),
    "optimizer": (lambda c: c.update(optimizer_states=["x"]), "optimizer_states is a list, not a list of dictionaries"),
    "groups": (lambda c: c["optimizer_states"][0]["param_groups"].pop(), "parameter groups and this run has"),
    "parameters": (lambda c: group(c)["params"].append(99), "param_groups.0 does not have the"),
    "rate": (lambda c: group(c).update(lr="fast"), r"param_groups.0.lr is 'fast'"),
    "long rate": (lambda c: group(c).update(lr=[0.1] * 10**5), r"param_groups.0.lr is a list"),
    "NaN rate": (lambda c: group(c).update(lr=float("nan")), r"param_groups.0.lr is nan"),
    "betas": (lambda c: group(c).update(betas=(0.9,)), r"param_groups.0.betas is a tuple, not a list of 2"),
    "moment": (lambda c: moments(c).update(exp_avg=torch.ones(3)), r"exp_avg is a tensor \(3,\) of torch.float32"),
    "whole moment": (
        lambda c: moments(c).update(exp_avg=moments(c)["exp_avg"].long()), r"exp_avg is a tensor .* of torch.int64"),
    "step": (lambda c: moments(c).update(step="x"), "step is 'x', not a count"),
    "no moment": (lambda c: moments(c).pop("exp_avg_sq"), "has no exp_avg_sq"),
    "parameter": (lambda c: c["optimizer_states"][0]["state"].update({999: {}}), "state.999 is of no parameter"),
    "no schedule": (lambda c: c.pop("lr_schedulers"), "it has no lr_schedulers"),
    "method": (lambda c: c["lr_schedulers"][0].update(step="x"), "lr_schedulers.0 has 'step', which a Cosine"),
    "schedule": (lambda c: c["lr_schedulers"][0].update(last_epoch="x"), "lr_schedulers.0.last_epoch is 'x'"),
    "rates": (lambda c: c["lr_schedulers"][0].update(base_lrs="abc"), "base_lrs is a str, not a list"),
    "callbacks": (lambda c: c.update(callbacks=[1]), "callbacks is a list, not a dictionary"),
    "callback": (lambda c: c["callbacks"].update(BatchSeeds="x"), "callbacks.BatchSeeds is a str"),
    "seed": (lambda c: c["callbacks"].update(BatchSeeds={"seed": "x"}), "seed, which is not a count"),
    "merges": (lambda c: c["callbacks"]["MergeRotations"].update(merges=-1), "merges is -1"),
    "curves": (lambda c: c["callbacks"]["OrthogonalityMonitor"].update(curves={"a": 1}), "curves"),
    "permutation": (
        lambda c: [t.zero_() for n, t in c["state_dict"].items() if n.endswith("permutation")],
        "permutation is no permutation"),
    "merge count": (
        lambda c: [t.fill_(10**6) for n, t in c["state_dict"].items() if n.endswith("merge_count")],
        "merge_count is 1,000,000 in a checkpoint of optimizer step 4"),
    "all NaN": (
        lambda c: [t.fill_(float("nan")) for t in c["state_dict"].values() if t.is_floating_point()],
        "the checkpoint holds nothing but NaN in model.model.embed_tokens.weight"),
    "one NaN": (
        lambda c: c["state_dict"]["model.model.norm.weight"].view(-1)[:1].fill_(float("nan")),
        "holds NaN or infinite values in model.model.norm.weight"),
    "infinite": (
        lambda c: c["state_dict"]["model.model.norm.weight"].view(-1)[:1].fill_(float("-inf")),
        "holds NaN or infinite values in model.model.norm.weight"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_restored_is_named(runs, case):
    change, message = CASES[case]
    path = runs.changed(change)
    with pytest.raises(ConfigurationError, match=message) as caught:
        runs.run("fit", ckpt_path=path, name="attempt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", ["no version", "network", "weight", "dtype", "permutation", "all NaN", "one NaN"])
def test_neither_does_an_evaluation_take_it(runs, case):
    change, message = CASES[case]
    with pytest.raises(ConfigurationError, match=message):
        runs.run("validate", ckpt_path=runs.changed(change), name="attempt")


def test_a_checkpoint_as_it_was_goes_on(runs):
    assert runs.run("fit", ckpt_path=runs.changed(lambda checkpoint: None), name="attempt").trainer.global_step == 6
    runs.run("validate", ckpt_path=runs.path, name="attempt")
