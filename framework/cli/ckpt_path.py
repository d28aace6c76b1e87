"""What ``--ckpt_path best`` means: the best file of a run that watches a metric."""

from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from orthotrain.checkpoints.reading import describe_checkpoint
from orthotrain.checkpoints.resume import newest_good_checkpoint
from orthotrain.checkpoints.run_folder import checkpoint_folders
from orthotrain.checkpoints.stored_paths import is_own_checkpoint
from orthotrain.console.progress import waiting
from orthotrain.errors import ConfigurationError
from orthotrain.files.atomic_writes import remove_leftovers


def best_checkpoint(trainer: L.Trainer) -> str:
    """Return the checkpoint that the newest one of the run's folder calls the best.

    Lightning itself knows the best only in the process that has trained.

    Raises:
        ConfigurationError: If the run has no ModelCheckpoint with a monitor, or no checkpoint that names the best.
    """
    watching = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor is not None]
    if not watching:
        raise ConfigurationError("--ckpt_path best needs a ModelCheckpoint with monitor, such as val_loss; take last")
    newest, _ = newest_good_checkpoint(checkpoint_folders(trainer))
    if newest is None:
        raise ConfigurationError("--ckpt_path best: this run has no checkpoint yet; fit it first")
    states = describe_checkpoint(newest).get("callbacks")
    best = None
    for callback in watching:
        state = states.get(callback.state_key) if isinstance(states, dict) else None
        best = best or _best_of(state, callback, Path(newest).parent)
    if best is None:
        raise ConfigurationError(f"--ckpt_path best: {str(newest)!r} names no best checkpoint that is there; take last")
    rank_zero_info(f"the best is {best}")
    return str(best)


def _best_of(state: object, callback: ModelCheckpoint, folder: Path) -> Path | None:
    """Return the best checkpoint that a stored state names, if that lies in the folder of the run, moved or not."""
    path = state.get("best_model_path") if isinstance(state, dict) else None
    if not path or not isinstance(path, str) or "\0" in path:
        return None
    for candidate in (Path(path), folder / Path(path).name):
        if candidate.exists() and is_own_checkpoint(candidate, folder, callback.FILE_EXTENSION):
            return candidate
    return None


def last_checkpoint(trainer: L.Trainer, resumes: bool) -> str | None:
    """Return what ``--ckpt_path last`` means: the newest checkpoint of the run's folder that is whole.

    What is skipped is said, with the reason; without any checkpoint a run begins at its first step, so that a
    scheduler can start a job and restart it by one command.

    Args:
        trainer: Says where the checkpoints lie.
        resumes: Whether training goes on from it; an evaluation takes weights alone too, and removes nothing of a run
            that may be under way.

    Raises:
        ConfigurationError: If none of the checkpoints is whole.
    """
    folders = checkpoint_folders(trainer)
    for folder in folders if resumes else ():
        remove_leftovers(folder)
    with waiting("checking the newest checkpoint"):
        path, skipped = newest_good_checkpoint(folders, resumes)
    for reason in skipped:
        rank_zero_warn(f"skipped: {reason}")
    if path is None:
        rank_zero_info(f"--ckpt_path last: no checkpoint in {', '.join(map(str, folders)) or 'this run'} yet")
        return None
    rank_zero_info(f"going on from {path}")
    return str(path)
