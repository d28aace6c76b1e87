"""``--ckpt_path FILE`` of the command line: what is no checkpoint ends in one line, whatever the command."""

import itertools
import os
import pickle

import lightning as L
import pytest
import torch
from torch import nn

from orthotrain.cli.ckpt_path import raised_while_restoring
from orthotrain.cli.main import main


class Trap:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def write(path, kind, trap):
    if kind == "object":
        torch.save({"state_dict": Trap(trap)}, path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Trap(trap)))
    elif kind == "legacy":
        torch.save({"state_dict": {}}, path, _use_new_zipfile_serialization=False)
    elif kind == "meta":
        torch.save({"state_dict": {"model.w": torch.empty(2, device="meta")}}, path)
    elif kind == "text":
        path.write_text("no checkpoint")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "zero":
        path.symlink_to("/dev/zero")
    else:
        torch.save({"list": [1], "string": "x", "tensor": torch.ones(2), "empty": {}}[kind], path)


KINDS = ("object", "pickle", "legacy", "meta", "text", "list", "string", "tensor", "empty", "fifo", "zero")


@pytest.mark.parametrize(("command", "kind"), zip(itertools.cycle(["fit", "validate", "predict"]), KINDS, strict=False))
def test_what_is_no_checkpoint_ends_in_one_line(command, kind, small_config, tmp_path, capfd):
    path = tmp_path / "bad.ckpt"
    write(path, kind, tmp_path / "sprung")
    arguments = ["-c", "pretrain/poet_quickstart.yaml", "-c", str(small_config), "--ckpt_path", str(path)]
    with pytest.raises(SystemExit) as stop:
        main([command, *arguments])
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "orthotrain: error" in line]
    assert stop.value.code == 2 and "bad.ckpt" in line and "weights_only" not in line and len(line) < 400
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("path", ["a\0b.ckpt", "no/such.ckpt"])
def test_a_path_that_is_none_ends_in_one_line(path, small_config, capfd):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "-c", "pretrain/poet_quickstart.yaml", "-c", str(small_config), "--ckpt_path", path])
    assert stop.value.code == 2
    assert "has a NUL character" in (error := capfd.readouterr().err) or "does not exist" in error


class Fails(L.Callback):
    """Raises where a checkpoint is restored, or in training."""

    def __init__(self, where):
        self.where = where

    def state_dict(self):
        return {"a": 1}

    def load_state_dict(self, state):
        if self.where == "restoring":
            raise RuntimeError("no such state")

    def on_train_batch_start(self, *arguments):
        if self.where == "training":
            raise RuntimeError("no such batch")


class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def training_step(self, batch, index):
        return self.linear(batch).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("where", ["restoring", "training"])
def test_errors_of_training_are_not_called_errors_of_the_checkpoint(where, tmp_path):
    def fit(steps, callback, **options):
        trainer = L.Trainer(
            accelerator="cpu", max_steps=steps, logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, callbacks=[callback],
        )  # fmt: skip
        trainer.fit(Module(), torch.utils.data.DataLoader(torch.ones(8, 2)), **options)
        return trainer

    fit(1, Fails(None)).save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(RuntimeError, match="no such") as caught:
        fit(2, Fails(where), ckpt_path=tmp_path / "a.ckpt")
    assert raised_while_restoring(caught.value) is (where == "restoring")
