"""A resumed run sees the batches that the uninterrupted one would have seen: real trainers, real checkpoints."""

import hashlib
import itertools

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint


class Recorder(L.LightningModule):
    """Learns nothing and writes down the epoch and the content of every batch."""

    def __init__(self, fail_at: int | None = None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []
        self.fail_at = fail_at

    def training_step(self, batch, index):
        if len(self.seen) == self.fail_at:
            raise RuntimeError("power cut")
        content = hashlib.sha256(batch["input_ids"].numpy().tobytes()).hexdigest()
        self.seen.append((self.current_epoch, content))
        return self.weight.sum()

    def validation_step(self, batch, index):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data, resume=None, folder=None, module=None, callbacks=(), **trainer):
    module, callbacks = module or Recorder(), list(callbacks)
    if folder:
        callbacks.append(ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}"))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    options = {"enable_checkpointing": bool(callbacks), "callbacks": callbacks, **quiet, **trainer}
    L.Trainer(accelerator="cpu", **options).fit(module, data, ckpt_path=resume)
    return module.seen


SETTINGS = {"batch_size": 12, "sequence_length": 128}
WAYS = [
    {"max_steps": 30},
    {"max_steps": 30, "val_check_interval": 4},
    {"max_epochs": 3, "val_check_interval": 5},
    {"max_steps": 30, "limit_train_batches": 7},
    {"max_steps": 12, "accumulate_grad_batches": 2},
]


READERS = [(False, 0), (True, 0), (False, 2), (True, 1)]
COMBINATIONS = [*itertools.product(READERS[:2], WAYS), *itertools.product(READERS[2:], WAYS[1:2])]
"""With workers, which run ahead whatever the trainer does, one way."""


@pytest.mark.parametrize(("reader", "trainer"), COMBINATIONS, ids=lambda value: ",".join(map(str, value)))
def test_the_next_batch_is_the_one_that_would_have_come(make_data, tmp_path, reader, trainer):
    streaming, workers = reader
    changes = SETTINGS | {"streaming": streaming, "num_workers": workers}
    whole = fit(make_data(**changes), folder=tmp_path, **trainer)
    epoch = sum(1 for number, _ in whole if number == 0)
    assert epoch > 5 and len(whole) > 2 * epoch, "the run crosses epochs"
    if not streaming:
        assert len(set(whole)) == len(whole), "no batch twice"
        assert len({content for _, content in whole}) == len(whole), "another order in each epoch"
    places = [epoch - 1, epoch + 2] if workers else [1, 5, epoch - 1, epoch, epoch + 1, 2 * epoch]
    per_step = trainer.get("accumulate_grad_batches", 1)
    # Lightning also steps on the last batch of an epoch, so with accumulation only places in the first one are simple.
    for place in places if per_step == 1 else [2, 4]:
        rest = fit(make_data(**changes), resume=tmp_path / f"step={place // per_step}.ckpt", **trainer)
        assert rest == whole[place:], f"resumed after {place} batches, {epoch} an epoch"


def test_an_interrupted_step_is_done_again(make_data, tmp_path):
    whole = fit(make_data(**SETTINGS), max_steps=20)
    module = Recorder(fail_at=9)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(make_data(**SETTINGS), module=module, callbacks=[OnExceptionCheckpoint(tmp_path)], max_steps=20)
    assert fit(make_data(**SETTINGS), resume=tmp_path / "on_exception.ckpt", max_steps=20) == whole[9:]


def test_checkpoints_are_plain_and_carry_the_tokenizer(make_data, tmp_path):
    fit(make_data(**SETTINGS), folder=tmp_path, max_steps=2)
    checkpoint = torch.load(tmp_path / "step=2.ckpt", weights_only=True)
    assert checkpoint["TextData"]["vocab_size"] == 300
    (place,) = checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    assert place["epoch"] == 0 and place["batches"] == 2


def test_another_batch_size_in_the_middle_of_an_epoch_is_refused(make_data, tmp_path):
    fit(make_data(**SETTINGS), folder=tmp_path, max_steps=2)
    with pytest.raises(ValueError, match="2 batches into epoch 0 with batch_size 12; this run has batch_size 6"):
        fit(make_data(**SETTINGS | {"batch_size": 6}), resume=tmp_path / "step=2.ckpt", max_steps=4)


def test_overfitting_repeats_the_same_batches(make_data):
    seen = fit(make_data(**SETTINGS), max_epochs=2, overfit_batches=2)
    first, second = ([content for number, content in seen if number == epoch] for epoch in (0, 1))
    assert first == second and len(set(first)) == 2


def test_without_a_validation_split_training_just_runs(make_data):
    assert len(fit(make_data(**SETTINGS | {"val_fraction": 0.0}), max_steps=3)) == 3


def test_predict_runs_through_a_trainer(make_data):
    class Echo(L.LightningModule):
        def predict_step(self, batch, index):
            return batch["input_ids"].shape

    data = make_data(predict_prompts=["kato", "rimu senola"])
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    shapes = trainer.predict(Echo(), data)
    assert len(shapes) == 2 and all(shape[0] == 1 for shape in shapes)
