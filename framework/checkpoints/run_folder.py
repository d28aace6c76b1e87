"""Folder of a run and of its checkpoints, and trial runs, which write no files."""

import copy
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers.logger import DummyLogger, Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_info


def is_trial(trainer: L.Trainer) -> bool:
    """Tell whether a run is a trial, whose results are not kept.

    Trials are ``fast_dev_run``, training on ``overfit_batches``, and the search of Lightning's Tuner for a learning
    rate or a batch size, which ends before the training.
    """
    overfits = trainer.overfit_batches and trainer.state.fn == "fit"  # type: ignore[attr-defined]
    searches = any(getattr(c, "_early_exit", False) for c in trainer.callbacks)  # type: ignore[attr-defined]
    return bool(trainer.fast_dev_run or overfits or searches)  # type: ignore[attr-defined]


def leave_nothing(trainer: L.Trainer | None) -> list[L.Callback]:
    """Remove everything that writes files from a trial: callbacks that save checkpoints or the config, and the loggers.

    A trial then changes nothing in the folder of an earlier run. Without this function, Lightning's callbacks would
    save at the end of a ``fast_dev_run``, and its loggers would delete the metrics of the earlier run.

    Returns:
        A callback that restores everything when the trial is over, for a trainer that is used again; an empty list for
        a run that is not a trial.
    """
    if trainer is None or not is_trial(trainer):
        return []
    if not trainer.fast_dev_run:  # type: ignore[attr-defined] # of fast_dev_run Lightning prints a message itself
        rank_zero_info("this run is a trial: it writes no checkpoint, no log and no report")
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    removed: list[L.Callback] = [c for c in callbacks if isinstance(c, Checkpoint | SaveConfigCallback)]
    trainer.callbacks = [callback for callback in callbacks if callback not in removed]  # type: ignore[attr-defined]
    restore = _RestoreWriters(removed, trainer.loggers)
    trainer.loggers = [DummyLogger()] if trainer.loggers else []
    return [restore]


class _RestoreWriters(L.Callback):
    """Gives the callbacks and loggers back that :func:`leave_nothing` has removed."""

    def __init__(self, removed: list[L.Callback], loggers: list[Logger]) -> None:
        self.removed, self.loggers = removed, loggers

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        trainer.callbacks = [c for c in callbacks if c is not self] + self.removed  # type: ignore[attr-defined]
        trainer.loggers = self.loggers


def run_folder(trainer: L.Trainer) -> Path | None:
    """Return the folder of a run, and create it if it is missing.

    It is the folder of the first logger, or else the root of the trainer. Every rank must call this function, because
    the trainer broadcasts the path from rank 0.

    Returns:
        The folder; None for a trial, which writes no files.
    """
    if is_trial(trainer):
        return None
    folder = Path(trainer.log_dir or trainer.default_root_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def checkpoint_folders(trainer: L.Trainer) -> list[Path]:
    """Return the folders in which the callbacks of a trainer save checkpoints.

    A callback that saves its own kind of checkpoints, as ``AdapterCheckpoint`` does, gives its folder by ``folder_of``.
    """
    folders = []
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            folders.append(checkpoint_folder_of(callback, trainer))
        elif hasattr(callback, "folder_of"):
            folders.append(callback.folder_of(trainer))
    return folders


def checkpoint_folder_of(callback: ModelCheckpoint, trainer: L.Trainer) -> Path:
    """Return the folder in which a ``ModelCheckpoint`` saves."""
    if callback.dirpath is None:
        callback = copy.copy(callback)  # setup would fix the folder for the rest of the run
        callback.setup(trainer, trainer.lightning_module, "validate")
    assert callback.dirpath is not None
    return Path(callback.dirpath)


def written_folders(trainer: L.Trainer) -> list[Path]:
    """Return the folders that a run writes to: the run folder and the checkpoint folders."""
    return [Path(trainer.log_dir or trainer.default_root_dir), *checkpoint_folders(trainer)]
