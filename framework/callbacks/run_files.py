"""Whether a run leaves files, and where: the one place that all callbacks ask."""

from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info


def is_trial(trainer: L.Trainer) -> bool:
    """Tell whether a run is a trial, of which nothing is kept: ``fast_dev_run``, or training on ``overfit_batches``."""
    overfits = trainer.overfit_batches and trainer.state.fn == "fit"  # type: ignore[attr-defined]
    return bool(trainer.fast_dev_run or overfits)  # type: ignore[attr-defined]


def leave_nothing(trainer: L.Trainer | None) -> None:
    """Take from a trial what would write files: every callback that saves checkpoints or the config, and the loggers.

    So a trial changes nothing in the folder of an earlier run. Lightning's own callbacks save at the end of a
    ``fast_dev_run`` too, and log ``overfit_batches`` over the earlier run's metrics.
    """
    if trainer is None or not is_trial(trainer):
        return
    if trainer.checkpoint_callbacks and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        rank_zero_info("overfit_batches: a trial, which writes no checkpoint, no log and no report")
    kept = [c for c in trainer.callbacks if not isinstance(c, Checkpoint | SaveConfigCallback)]  # type: ignore
    trainer.callbacks = kept  # type: ignore[attr-defined]
    trainer.loggers = [DummyLogger()] if trainer.loggers else []


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
