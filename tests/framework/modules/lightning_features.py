"""The callbacks and flags of Lightning, each tried on three modules: the table of docs/pages/lightning.md.

    .venv/bin/python tests/framework/modules/lightning_features.py            # prints the table
    .venv/bin/python tests/framework/modules/lightning_features.py --write    # puts it into the page

A feature works if the run ends, has taken the steps that it should take, and reports a finite loss.
test_lightning_features.py compares the page with new runs.
"""

import argparse
import contextlib
import io
import logging
import math
import re
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch import callbacks as given
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from orthotrain.errors import ConfigurationError
from orthotrain.modules import OftLayers, OftModule, Optimization, PoetLayers, PoetModule

PAGE = Path(__file__).resolve().parents[3] / "docs/pages/lightning.md"
PLACE = re.compile(r"(<!-- table: lightning -->\n).*?(<!-- end of table -->)", re.DOTALL)
BATCHES = 7

POET = PoetLayers(block_size=4, include=["hidden"], init="keep")
MODULES: dict[str, Callable[..., L.LightningModule]] = {
    "PoetModule": partial(PoetModule, layers=POET),
    "step-wise": partial(PoetModule, layers=POET, stepwise=True),
    "OftModule": partial(OftModule, layers=OftLayers(block_size=4)),
}


class Network(nn.Module):
    """A language model that sees one token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.hidden, self.head = nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 16)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return logits."""
        return self.head(self.hidden(self.embedding(input_ids)).tanh())


class Rows(L.LightningDataModule):
    """Seven batches an epoch, of rows whose numbers of targets differ."""

    batch_size = 2

    def train_dataloader(self) -> DataLoader:
        """Return the rows."""
        ids = torch.randint(0, 16, (2 * BATCHES, 9), generator=torch.Generator().manual_seed(0))
        labels = ids[:, 1:].clone()
        labels[::3, 4:] = -100
        rows = [{"input_ids": i, "labels": targets} for i, targets in zip(ids[:, :-1], labels, strict=True)]
        return DataLoader(rows, self.batch_size)

    val_dataloader = train_dataloader


def with_callback(callback: Callable[[Path], L.Callback], **options: Any) -> Callable[[Path], dict[str, Any]]:
    """Return a function from a folder to the options of a trainer with a callback and a logger."""
    return lambda folder: {"callbacks": callback(folder), "logger": CSVLogger(folder), **options}


def with_flags(**options: Any) -> Callable[[Path], dict[str, Any]]:
    """Return a function from a folder to options of a trainer."""
    return lambda folder: options


# Lightning has the gradient scaler of 16-mixed on a GPU only
SCALED = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))
BEYOND = {"val_check_interval": 9, "check_val_every_n_epoch": None, "max_epochs": 3}
SHOWN = {"enable_progress_bar": True, "enable_model_summary": True}
SAVES = {"enable_checkpointing": True}
NO_OPTIONS = ("enable_checkpointing", "enable_progress_bar", "enable_model_summary", "log_every_n_steps", "logger")
BARE = {"barebones": True, "num_sanity_val_steps": None, **dict.fromkeys(NO_OPTIONS)}

FLAGS: dict[str, tuple[Callable[[Path], dict[str, Any]], int]] = {
    "`accumulate_grad_batches`, a short last window": (with_flags(accumulate_grad_batches=3), 3),
    "`gradient_clip_val`, by norm": (with_flags(gradient_clip_val=0.1), 7),
    "`gradient_clip_val`, by value": (with_flags(gradient_clip_val=0.1, gradient_clip_algorithm="value"), 7),
    "`precision: 32-true`": (with_flags(precision="32-true"), 7),
    "`precision: 16-mixed`": (with_flags(precision=None, plugins=SCALED), 7),
    "`precision: bf16-mixed`": (with_flags(precision="bf16-mixed"), 7),
    "`precision: bf16-true`": (with_flags(precision="bf16-true"), 7),
    "`precision: 16-true`": (with_flags(precision="16-true"), 7),
    "`precision: 64-true`": (with_flags(precision="64-true"), 7),
    "`fast_dev_run`": (with_flags(fast_dev_run=2), 2),
    "`overfit_batches`": (with_flags(overfit_batches=2), 2),
    "`limit_train_batches`, `limit_val_batches`": (with_flags(limit_train_batches=3, limit_val_batches=1), 3),
    "`max_steps`": (with_flags(max_steps=9, max_epochs=-1), 9),
    "`max_time`": (with_flags(max_time={"seconds": 0}, max_epochs=-1), 0),
    "`val_check_interval` beyond an epoch": (with_flags(**BEYOND), 21),
    "`num_sanity_val_steps: -1`": (with_flags(num_sanity_val_steps=-1), 7),
    "`reload_dataloaders_every_n_epochs`": (with_flags(reload_dataloaders_every_n_epochs=1, max_epochs=2), 14),
    "`detect_anomaly`": (with_flags(detect_anomaly=True), 7),
    "`deterministic`": (with_flags(deterministic=True), 7),
    "`inference_mode: false`": (with_flags(inference_mode=False), 7),
    "`barebones`": (with_flags(**BARE), 7),
    "`profiler: simple`": (with_flags(profiler="simple"), 7),
    "`profiler: advanced`": (with_flags(profiler="advanced"), 7),
    "`profiler: pytorch`": (with_flags(profiler="pytorch"), 7),
    "several loggers": (lambda folder: {"logger": [CSVLogger(folder), TensorBoardLogger(folder)]}, 7),
}
"""Flag -> the options of a trainer, and the optimizer steps of its run."""

CALLBACKS: dict[str, tuple[Callable[[Path], dict[str, Any]], int]] = {
    "BackboneFinetuning": (with_callback(lambda _: given.BackboneFinetuning(1)), 7),
    "BatchSizeFinder": (with_callback(lambda _: given.BatchSizeFinder(steps_per_trial=1, max_trials=2)), 4),
    "DeviceStatsMonitor": (with_callback(lambda _: given.DeviceStatsMonitor(cpu_stats=True)), 7),
    "EarlyStopping": (with_callback(lambda _: given.EarlyStopping("val_loss", 9, patience=1), max_epochs=9), 14),
    "EMAWeightAveraging": (with_callback(lambda _: given.EMAWeightAveraging()), 7),
    "GradientAccumulationScheduler": (
        with_callback(lambda _: given.GradientAccumulationScheduler({1: 2}), max_epochs=2),
        11,
    ),
    "LearningRateFinder": (with_callback(lambda _: given.LearningRateFinder(max_lr=0.1, num_training_steps=16)), 7),
    "LearningRateMonitor": (with_callback(lambda _: given.LearningRateMonitor()), 7),
    "ModelCheckpoint": (with_callback(lambda f: given.ModelCheckpoint(f, monitor="val_loss"), **SAVES), 7),
    "ModelPruning": (with_callback(lambda _: given.ModelPruning("l1_unstructured", amount=0.5)), 7),
    "ModelSummary": (with_callback(lambda _: given.ModelSummary(2), **SHOWN), 7),
    "OnExceptionCheckpoint": (with_callback(lambda f: given.OnExceptionCheckpoint(f), **SAVES), 7),
    "RichModelSummary": (with_callback(lambda _: given.RichModelSummary(), **SHOWN), 7),
    "RichProgressBar": (with_callback(lambda _: given.RichProgressBar(), **SHOWN), 7),
    "SpikeDetection": (with_callback(lambda f: given.SpikeDetection(exclude_batches_path=f / "spikes.json")), 7),
    "StochasticWeightAveraging": (with_callback(lambda _: given.StochasticWeightAveraging(1e-3), max_epochs=2), 14),
    "ThroughputMonitor": (with_callback(lambda _: given.ThroughputMonitor(lambda batch: len(batch["labels"]))), 7),
    "Timer": (with_callback(lambda _: given.Timer("00:00:05:00")), 7),
    "TQDMProgressBar": (with_callback(lambda _: given.TQDMProgressBar(), **SHOWN), 7),
    "WeightAveraging": (with_callback(lambda _: given.WeightAveraging()), 7),
}
"""Callback -> the same."""

QUIET = {
    **{"accelerator": "cpu", "max_epochs": 1, "num_sanity_val_steps": 0, "log_every_n_steps": 1, "logger": False},
    **{"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False},
}


def attempt(module: str, feature: tuple[Callable[[Path], dict[str, Any]], int]) -> str:
    """Run a feature on a module; return ``works``, or the message that refuses it."""
    options, steps = feature
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        torch.manual_seed(0)
        made = MODULES[module](Network(), optimization=Optimization(lr=1e-3))
        try:
            trainer = L.Trainer(**{"default_root_dir": folder, **QUIET, **options(Path(folder))})
            trainer.fit(made, datamodule=Rows())
        except ConfigurationError as error:
            return f"refused: {error}"
        finally:
            torch.use_deterministic_algorithms(False)
            torch.autograd.set_detect_anomaly(False)
    assert trainer.global_step == steps, f"{trainer.global_step} steps, not {steps}"
    assert math.isfinite(trainer.callback_metrics.get("train_loss", 0.0))
    return "works"


def table() -> str:
    """Run everything, and return the table in Markdown, with the messages below it."""
    messages: list[str] = []

    def cell(result: str) -> str:
        if result == "works":
            return result
        if result not in messages:
            messages.append(result)
        return f"refused ({messages.index(result) + 1})"

    lines = [["flag or callback", *MODULES], ["-"] * (1 + len(MODULES))]
    features = FLAGS | {f"`{name}`": feature for name, feature in CALLBACKS.items()}
    for name, feature in features.items():
        lines.append([name, *(cell(attempt(module, feature)) for module in MODULES)])
    rows = "\n".join(f"| {' | '.join(line)} |" if line[0] != "-" else f"|{'|'.join(line)}|" for line in lines)
    said = "\n".join(f"{number}. {text.removeprefix('refused: ')}" for number, text in enumerate(messages, 1))
    return f"{rows}\n\nThe messages:\n\n{said}"


def filled(page: str) -> str:
    """Return the page with a new table."""
    return PLACE.sub(lambda match: f"{match[1]}{table()}\n{match[2]}", page)


def main() -> None:
    """Print the table, or write it into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into the page")
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if parser.parse_args().write:
        PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(table())


if __name__ == "__main__":
    main()
