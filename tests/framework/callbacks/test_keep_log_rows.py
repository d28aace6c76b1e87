"""A resumed run continues its metrics.csv; a new run begins a new one."""

import csv

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from orthotrain.modules import Optimization, PoetLayers, PoetModule


class Regression(PoetModule):
    def loss(self, batch):
        return self(batch).square().mean()


def fit(folder, epochs, ckpt_path=None):
    """Two sides, and a bias with a rate of its own: four parameter groups."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    rates = Optimization(lr=1e-3, rotation_lr=4e-3, lr_overrides={"0.bias": 1e-4})
    module = Regression(network, PoetLayers(block_size=4, init="keep"), merge_every=3, optimization=rates)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=epochs, enable_progress_bar=False, enable_model_summary=False,
        log_every_n_steps=1, logger=CSVLogger(folder, name="", version=""), default_root_dir=folder,
        callbacks=[LearningRateMonitor(), ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1)],
    )  # fmt: skip
    rows = DataLoader(torch.randn(20, 8), batch_size=4)
    trainer.fit(module, rows, ckpt_path=ckpt_path)
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
def test_rows_before_the_checkpoint_are_kept(tmp_path):
    first = fit(tmp_path, 1)
    assert {int(row["step"]) for row in first} == set(range(5))
    last = first[-1]
    assert float(last["lr"]) == pytest.approx(1e-3) and float(last["rotation_lr"]) == pytest.approx(4e-3)
    assert float(last["peak_memory_gib"]) > 0
    assert {name for name in last if name.startswith("lr-")} == {
        "lr-AdamW/rotations_in", "lr-AdamW/rotations_out", "lr-AdamW/no_decay", "lr-AdamW/no_decay_2",
    }  # fmt: skip
    (saved,) = tmp_path.glob("*step=4.ckpt")
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("7,half a row of a killed run")
    resumed = fit(tmp_path, 2, saved)
    # the step after the checkpoint is taken, and logged, again
    assert [int(row["step"]) for row in resumed if row["train_loss"]] == list(range(10))
    kept = [row["train_loss"] for row in first if int(row["step"]) < 4]
    assert [row["train_loss"] for row in resumed if int(row["step"]) < 4] == kept
    assert {int(row["step"]) for row in fit(tmp_path, 1)} == set(range(5))
