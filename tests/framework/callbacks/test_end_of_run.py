"""However a run ends, its last step is saved, and a resume from it gives the uninterrupted run."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from orthotrain.callbacks import AdapterCheckpoint
from orthotrain.checkpoints.reading import read_checkpoint
from orthotrain.data import TextData
from orthotrain.models import CausalLM
from orthotrain.modules import OftLayers, OftModule, PoetLayers, PoetModule

BATCHES, STEPS = 10, 10  # batches of an epoch, two a step; steps of the uninterrupted run, which are two epochs


class Losses(L.Callback):
    """Records the loss of every batch by epoch and position, the step of every validation, and every save."""

    def __init__(self, stop_at=None):
        self.losses, self.validated, self.saves, self.stop_at = {}, [], [], stop_at

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses[trainer.current_epoch, batch_idx] = outputs["loss"].item()
        if (trainer.current_epoch, batch_idx) == self.stop_at:
            trainer.should_stop = True

    def on_validation_end(self, trainer, module):
        self.validated.append(trainer.global_step)

    def on_save_checkpoint(self, trainer, module, checkpoint):
        self.saves.append(trainer.global_step)


class Stops(PoetModule):
    """Stops in a hook that runs after the hooks of all callbacks."""

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.trainer.should_stop = self.global_step == 3


def fit(network, corpus, folder, saving=(), module=PoetModule, record=None, resume=None, **options):
    L.seed_everything(0, verbose=False)
    data = TextData(
        str(corpus), vocab_size=320, sequence_length=16, batch_size=2, cache_dir=str(corpus.parent / "cache"),
        val_fraction=0.1, test_fraction=0.0,
    )  # fmt: skip
    record = record or Losses()
    given = {"max_steps": STEPS, "val_check_interval": 4, "limit_train_batches": BATCHES, **options}
    trainer = L.Trainer(
        accelerator="cpu", accumulate_grad_batches=2, num_sanity_val_steps=0, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=bool(saving),
        default_root_dir=folder, callbacks=[*given.pop("callbacks", []), record, *saving], **given,
    )  # fmt: skip
    model = CausalLM({**network, "vocab_size": 320, "attention_dropout": 0.1})
    module = module(model, PoetLayers(block_size=8), merge_every=3)
    trainer.fit(module, data, ckpt_path=resume)
    return record, {name: tensor.clone() for name, tensor in module.state_dict().items()}, trainer


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory):
    """The uninterrupted run, by the options that decide when it validates."""
    runs = {}

    def get(network, **options):
        key = str(options)
        if key not in runs:
            runs[key] = fit(network, corpus, tmp_path_factory.mktemp("whole"), **options)
        return runs[key]

    return get


def never(**options):
    return EarlyStopping("val_loss", patience=1, min_delta=10.0, **options)


EPOCHS = {"val_check_interval": None, "max_epochs": 2, "max_steps": -1}
# end -> the step after which it comes, its cause, the options that decide when the run validates
ENDS = {
    "steps, no validation there": (3, {"max_steps": 3}, {}),
    "steps, a validation there": (4, {"max_steps": 4}, {}),
    "steps, at the end of an epoch": (5, {"max_steps": 5}, {}),
    "steps, a validation at the end of an epoch": (5, {"max_steps": 5}, {"val_check_interval": None}),
    "steps, in the second epoch": (8, {"max_steps": 8}, {}),
    "epochs": (5, {"max_epochs": 1}, EPOCHS),
    "epochs, no validation": (5, {"max_epochs": 1}, {**EPOCHS, "limit_val_batches": 0}),
    "early stopping": (4, {"callbacks": [never]}, {}),
    "early stopping at the end of an epoch": (10, {"callbacks": [never]}, {**EPOCHS, "max_epochs": 3}),
    "time, after two micro-batches": (3, {"record": (0, 5)}, {}),
    "time, between two micro-batches": (3, {"record": (0, 6)}, {}),
    "time, between two micro-batches of the second epoch": (6, {"record": (1, 2)}, {}),
    "a hook of the module": (3, {"module": Stops}, {}),
}


@pytest.mark.parametrize("end", ENDS)
def test_the_last_step_is_saved_and_goes_on_to_the_uninterrupted_run(end, tiny_llama, corpus, tmp_path, uninterrupted):
    step, ending, settings = ENDS[end]
    limit = {"limit_val_batches": 1, **settings}
    whole, expected, _ = uninterrupted(tiny_llama, **limit)
    ending = {**limit, **ending, "callbacks": [make() for make in ending.get("callbacks", [])]}
    ending["record"] = Losses(stop_at=ending.get("record"))
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=20, save_last=True)
    first, _, trainer = fit(tiny_llama, corpus, tmp_path, [saves], **ending)
    assert trainer.global_step == step
    last = tmp_path / "last.ckpt"
    assert read_checkpoint(last)["global_step"] == step and saves.last_model_path == str(last)
    assert first.saves == [step], "the last step is saved, once"
    second, found, _ = fit(tiny_llama, corpus, tmp_path / "b", resume=str(last), **limit)
    losses = {**first.losses, **second.losses}
    assert losses == whole.losses
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def saver(folder, **options):
    return ModelCheckpoint(folder, **{"every_n_train_steps": 2, **options})


SAVING = {
    "last beside the newest": (lambda f: [saver(f, save_last=True, filename="{step}")], ["last.ckpt", "step=2.ckpt"]),
    "a link": (lambda f: [saver(f, save_last="link", filename="{step}")], ["last.ckpt", "step=2.ckpt"]),
    "the newest": (lambda f: [saver(f, filename="{step}")], ["step=3.ckpt"]),
    "all": (lambda f: [saver(f, filename="{step}", save_top_k=-1)], ["step=2.ckpt", "step=3.ckpt"]),
    "the best alone": (
        lambda f: [saver(f, monitor="train_loss", mode="max", filename="best")],
        ["best.ckpt", "last.ckpt"],
    ),
    "two": (
        lambda f: [saver(f, filename="{step}", every_n_train_steps=3), saver(f, save_last=True, save_top_k=0)],
        ["last.ckpt", "step=3.ckpt"],
    ),
    "at the last step": (
        lambda f: [saver(f, every_n_train_steps=3, save_last=True, filename="{step}")],
        ["last.ckpt", "step=3.ckpt"],
    ),
    "none": (lambda f: [saver(f, save_top_k=0)], []),
    "no callback": (lambda f: [], []),
}


@pytest.mark.parametrize("saving", SAVING)
def test_what_a_run_saves_at_its_end_is_what_its_callbacks_save(saving, tiny_llama, corpus, tmp_path):
    make, expected = SAVING[saving]
    record, *_ = fit(tiny_llama, corpus, tmp_path, make(tmp_path / "saved"), max_steps=3)
    found = {path.name: read_checkpoint(path)["global_step"] for path in (tmp_path / "saved").glob("*")}
    assert sorted(found) == expected
    assert not expected or max(found.values()) == 3
    assert found.get("last.ckpt", 3) == 3, "last.ckpt is the end of the run, whatever else there is"
    assert len(record.saves) == len(set(record.saves)) + (
        saving in ("two", "at the last step", "last beside the newest")
    )


def test_an_adapter_run_saves_its_end_once_and_goes_on(tiny_llama, corpus, tmp_path):
    torch.manual_seed(3)
    base = CausalLM({**tiny_llama, "vocab_size": 320})().state_dict()

    def oft(model, *arguments, **options):
        def build():
            network = CausalLM({**tiny_llama, "vocab_size": 320})()
            network.load_state_dict(base)
            return network

        return OftModule(build, OftLayers(block_size=8), max_new_tokens=0)

    whole, expected, _ = fit(tiny_llama, corpus, tmp_path / "whole", module=oft)
    for ending, step in (({"record": Losses(stop_at=(0, 6))}, 3), ({"max_steps": 5}, 5)):
        folder = tmp_path / str(step)
        first, *_ = fit(tiny_llama, corpus, folder, [AdapterCheckpoint(4, dirpath=folder)], module=oft, **ending)
        assert first.saves == [n for n in (4, step) if n <= step]
        last = folder / f"step-00000{step}" / "resume.ckpt"
        second, found, _ = fit(tiny_llama, corpus, tmp_path / "b", module=oft, resume=str(last))
        assert {**first.losses, **second.losses} == whole.losses
        assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_a_run_in_parts_is_the_uninterrupted_one(tiny_llama, corpus, tmp_path, uninterrupted):
    """Each part ends with an epoch, or at a limit that the next part does not have."""
    _, expected, _ = uninterrupted(tiny_llama)
    part, last = Losses(), None
    for steps, batches in ((3, 6), (4, 10), (5, 10), (10, 10)):
        saves = [ModelCheckpoint(tmp_path / str(steps), every_n_train_steps=20, save_last=True)]
        options = {"max_steps": steps, "limit_train_batches": batches}
        _, found, _ = fit(tiny_llama, corpus, tmp_path, saves, record=part, resume=last, **options)
        last = str(tmp_path / str(steps) / "last.ckpt")
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    whole, expected, _ = fit(tiny_llama, corpus, tmp_path, max_steps=20)
    parts = fit(tiny_llama, corpus, tmp_path, saves, resume=last, max_steps=15)[0].losses
    last = read_checkpoint(last) and str(saves[0].last_model_path)
    after, found, _ = fit(tiny_llama, corpus, tmp_path, resume=last, max_steps=20)
    assert {**part.losses, **parts, **after.losses} == whole.losses
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
