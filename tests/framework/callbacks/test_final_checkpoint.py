"""SIGTERM and Ctrl-C: what is saved, when the run ends, and that a resume reaches the same weights."""

import os
import signal

import pytest
import torch

from orthotrain.checkpoints.reading import read_checkpoint
from orthotrain.cli.main import main
from orthotrain.console.termination import _note
from orthotrain.data import TextData
from orthotrain.modules import BaseModule

SIGNALS = {"SIGTERM": signal.SIGTERM, "Ctrl-C": signal.SIGINT}
QUICK = ["fit", "-c", "pretrain/poet_quickstart.yaml"]


def signalled(monkeypatch, step_method, when, signum):
    """Send the process a signal when a step method is called for the ``when``-th time."""
    original, calls = getattr(BaseModule, step_method), []

    def step(self, batch, batch_idx):
        calls.append(self.global_step)
        if len(calls) == when:
            os.kill(os.getpid(), signum)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(BaseModule, step_method, step)
    return calls


def ended_with(command):
    with pytest.raises(SystemExit) as stop:
        main(command)
    return stop.value.code


@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize(
    ("step_method", "when", "saved", "extra"),
    [
        ("training_step", 2, 2, []),
        ("validation_step", 2, 3, []),  # the first validation is the check before training
        ("validation_step", 2, 5, ["--trainer.val_check_interval", "5", "--trainer.limit_train_batches", "5"]),
    ],
    ids=["training", "validation", "validation at the end of an epoch"],
)
def test_the_run_saves_and_goes_on_to_the_same_weights(
    small_config, tmp_path, monkeypatch, caplog, capfd, name, step_method, when, saved, extra
):
    command = [*QUICK, "-c", str(small_config), "--trainer.num_sanity_val_steps", "1", *extra]
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    main(command)
    whole = read_checkpoint(last)["state_dict"]
    for path in last.parent.iterdir():
        path.unlink()
    with monkeypatch.context() as patch:
        calls = signalled(patch, step_method, when, SIGNALS[name])
        before = signal.getsignal(SIGNALS[name])
        assert ended_with(command) == 128 + SIGNALS[name]
        assert len(calls) == when
        assert signal.getsignal(SIGNALS[name]) is before
    assert f"{name}: step {saved} is saved as {last}" in caplog.text
    assert ("again to end at once" in capfd.readouterr().err) == (name == "Ctrl-C")
    assert read_checkpoint(last)["global_step"] == saved
    main([*command, "--ckpt_path", "last"])
    resumed = read_checkpoint(last)
    assert resumed["global_step"] == 6
    assert all(torch.equal(whole[key], resumed["state_dict"][key]) for key in whole)


@pytest.mark.parametrize("name", SIGNALS)
def test_after_training_the_signals_are_what_they_were(small_config, name):
    """A handler that stayed after the run would note the signal, and the program would never end."""
    before = signal.getsignal(SIGNALS[name])
    main([*QUICK, "-c", str(small_config), "--trainer.max_steps", "1"])
    assert signal.getsignal(SIGNALS[name]) is before


def test_before_training_the_run_ends_with_the_code_of_the_signal(small_config, tmp_path, monkeypatch):
    calls = signalled(monkeypatch, "validation_step", 1, signal.SIGTERM)
    assert ended_with([*QUICK, "-c", str(small_config), "--trainer.num_sanity_val_steps", "2"]) == 143
    assert calls == [0] and not list((tmp_path / "run").rglob("*.ckpt"))


def test_validate_too_ends_with_the_code_of_the_signal(small_config, monkeypatch):
    calls = signalled(monkeypatch, "validation_step", 1, signal.SIGTERM)
    assert ended_with(["validate", *QUICK[1:], "-c", str(small_config)]) == 143
    assert len(calls) == 1


def test_between_micro_batches_the_validation_is_run_to_its_end(small_config, tmp_path, monkeypatch):
    calls = signalled(monkeypatch, "validation_step", 2, signal.SIGTERM)
    extra = ["--trainer.accumulate_grad_batches", "2", "--trainer.num_sanity_val_steps", "0"]
    assert ended_with([*QUICK, "-c", str(small_config), "--trainer.limit_val_batches", "3", *extra]) == 143
    assert len(calls) == 3  # after three micro-batches, in the middle of the second step
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 2


def test_lightning_sets_no_handler_that_communicates(small_config, monkeypatch):
    """Lightning's handler broadcasts from inside the signal; it is replaced before the training data is loaded."""
    seen, original = [], TextData.train_dataloader

    def look(self):
        seen.append([signal.getsignal(signum) for signum in SIGNALS.values()])
        return original(self)

    monkeypatch.setattr(TextData, "train_dataloader", look)
    main([*QUICK, "-c", str(small_config), "--trainer.max_steps", "1"])
    assert seen == [[_note, _note]] * len(seen) and seen


@pytest.mark.parametrize("command", ["test", "predict"])
def test_an_evaluation_ends_after_the_batch_under_way(small_config, monkeypatch, command):
    calls = signalled(monkeypatch, f"{command}_step", 1, signal.SIGINT)
    assert ended_with([command, *QUICK[1:], "-c", str(small_config)]) == 130
    assert len(calls) == 1


def test_after_training_the_report_ends_at_its_next_safe_point(small_config, tmp_path, monkeypatch):
    def report(self, trainer, module):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("orthotrain.callbacks.RunReport.on_fit_end", report)
    assert ended_with([*QUICK, "-c", str(small_config)]) == 143
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 6
