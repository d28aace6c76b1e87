"""What ``--ckpt_path best`` means: the best file of a run that watches a metric."""

from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from orthotrain.checkpoints.reading import describe_checkpoint
from orthotrain.checkpoints.resume import checkpoint_folders, newest_good_checkpoint
from orthotrain.checkpoints.stored_paths import is_own_checkpoint
from orthotrain.errors import ConfigurationError


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
