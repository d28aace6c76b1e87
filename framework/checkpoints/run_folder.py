"""Whether a run leaves files, and where: its folder, and those of its checkpoints."""

from pathlib import Path
from typing import Protocol, runtime_checkable

import lightning as L
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers.logger import DummyLogger, Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_info


@runtime_checkable
class SavesItself(Protocol):
    """A callback that saves checkpoints of its own, as ``AdapterCheckpoint`` does."""

    def folder_of(self, trainer: L.Trainer) -> Path:
        """Return the folder in which the callback saves the checkpoints of a trainer."""
        ...


def is_trial(trainer: L.Trainer) -> bool:
    """Tell whether a run is a trial, of which nothing is kept.

    Trials are ``fast_dev_run``, training on ``overfit_batches``, and the searches of Lightning's Tuner for a learning
    rate or a batch size, which end before the training.
    """
    overfits = trainer.overfit_batches and trainer.state.fn == "fit"  # type: ignore[attr-defined]
    searches = any(getattr(c, "_early_exit", False) for c in trainer.callbacks)  # type: ignore[attr-defined]
    return bool(trainer.fast_dev_run or overfits or searches)  # type: ignore[attr-defined]


def leave_nothing(trainer: L.Trainer | None) -> list[L.Callback]:
    """Take from a trial what would write files: every callback that saves checkpoints or the config, and the loggers.

    So a trial changes nothing in the folder of an earlier run. Lightning's own callbacks save at the end of a
    ``fast_dev_run`` too, and its loggers delete the earlier run's metrics.

    Returns:
        A callback that gives all of it back when the trial is over, for a trainer that is used again; no callback for a
        run that is no trial.
    """
    if trainer is None or not is_trial(trainer):
        return []
    if not trainer.fast_dev_run:  # type: ignore[attr-defined] # Lightning says so itself
        rank_zero_info("this run is a trial: it writes no checkpoint, no log and no report")
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    taken: list[L.Callback] = [
        callback for callback in callbacks if isinstance(callback, Checkpoint | SaveConfigCallback)
    ]
    trainer.callbacks = [callback for callback in callbacks if callback not in taken]  # type: ignore[attr-defined]
    returns = _Returns(taken, trainer.loggers)
    trainer.loggers = [DummyLogger()] if trainer.loggers else []
    return [returns]


class _Returns(L.Callback):
    """Holds what was taken from a trial."""

    def __init__(self, callbacks: list[L.Callback], loggers: list[Logger]) -> None:
        self.taken, self.loggers = callbacks, loggers

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        trainer.callbacks = [c for c in callbacks if c is not self] + self.taken  # type: ignore[attr-defined]
        trainer.loggers = self.loggers


def run_folder(trainer: L.Trainer) -> Path | None:
    """Return the folder of the run, made if need be: that of its first logger, else the trainer's root.

    Every rank must call it: the trainer broadcasts the name from the first one.

    Returns:
        None for a trial, which writes no files.
    """
    if is_trial(trainer):
        return None
    folder = Path(trainer.log_dir or trainer.default_root_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def checkpoint_folders(trainer: L.Trainer) -> list[Path]:
    """Return where the callbacks of a trainer save their checkpoints."""
    folders = []
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            folders.append(checkpoint_folder_of(callback, trainer))
        elif isinstance(callback, SavesItself):
            folders.append(callback.folder_of(trainer))
    return folders


def checkpoint_folder_of(callback: ModelCheckpoint, trainer: L.Trainer) -> Path:
    """Return where a ``ModelCheckpoint`` saves."""
    # Lightning's own search, which only knows last*.ckpt, resolves it this way
    return Path(callback._ModelCheckpoint__resolve_ckpt_dir(trainer))  # type: ignore[attr-defined]


def written_folders(trainer: L.Trainer) -> list[Path]:
    """Return the folders that a run writes to: its own, and those of its checkpoints."""
    return [Path(trainer.log_dir or trainer.default_root_dir), *checkpoint_folders(trainer)]
