"""What ``--ckpt_path best`` means: the best file of a run that watches a metric."""

from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from orthotrain.checkpoint import read_checkpoint
from orthotrain.errors import ConfigurationError
from orthotrain.resume import checkpoint_folders, newest_good_checkpoint
from orthotrain.sharded_checkpoint import REST


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
    states = read_checkpoint(newest / REST if newest.is_dir() else newest).get("callbacks", {})
    found = (states.get(callback.state_key, {}).get("best_model_path") for callback in watching)
    best = next((Path(path) for path in found if path), None)
    if best is not None and not best.exists():  # the run folder was moved
        best = newest.with_name(best.name)
    if best is None or not best.exists():
        raise ConfigurationError(f"--ckpt_path best: {str(newest)!r} names no best checkpoint that is there; take last")
    rank_zero_info(f"the best is {best}")
    return str(best)
