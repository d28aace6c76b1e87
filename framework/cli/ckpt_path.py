"""The checkpoint of ``--ckpt_path``: a file or folder of a run, ``last`` or ``best``."""

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.connectors import checkpoint_connector
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from orthotrain.checkpoints.reading import describe_checkpoint, refuse_run_folder
from orthotrain.checkpoints.resume import check_resumable, newest_good_checkpoint
from orthotrain.checkpoints.run_folder import checkpoint_folders
from orthotrain.checkpoints.stored_paths import is_own_checkpoint
from orthotrain.console.progress import waiting
from orthotrain.errors import ConfigurationError, DeviceMemoryExhausted, TrainingDiverged
from orthotrain.files.atomic_writes import remove_leftovers
from orthotrain.files.paths import local_path
from orthotrain.modules import BaseModule


def check_path(path: str | None) -> None:
    """Refuse a path that holds no checkpoint, before the data is prepared.

    The values in the checkpoint are compared with their checksums later, when they are read.

    Raises:
        ConfigurationError: If the path does not exist, or is no checkpoint.
    """
    if path is None or path in ("last", "best", "hpc"):
        return
    local_path(path, "--ckpt_path")
    if not Path(path).exists():
        raise ConfigurationError(f"--ckpt_path {path!r} does not exist; give a checkpoint of a run, last or best")
    refuse_run_folder(Path(path))
    describe_checkpoint(path)


def checkpoint_of(trainer: L.Trainer, path: str | None, command: str) -> str | None:
    """Return the checkpoint that a command starts from, None for none.

    Args:
        trainer: The trainer, which knows the folders of the run's checkpoints.
        path: The value of ``--ckpt_path``.
        command: ``fit``, ``validate``, ``test`` or ``predict``.

    Raises:
        ConfigurationError: If there is no such checkpoint, or training cannot resume from it.
    """
    if path == "last":
        path = last_checkpoint(trainer, resumes=command == "fit")
        if path is None and command != "fit":
            raise ConfigurationError(f"--ckpt_path last: this run has no checkpoint to {command}; fit it first")
    elif path == "best":
        path = best_checkpoint(trainer)
    elif path is None:
        _note_missing_path(trainer, command)
    if path is not None and command == "fit":
        check_resumable(path)
    return path


def _note_missing_path(trainer: L.Trainer, command: str) -> None:
    """Log what a command does without ``--ckpt_path``, which the user may have forgotten."""
    if command != "fit":
        rank_zero_info(f"no --ckpt_path: {command} takes the network as the config builds it, not a trained one")
        return
    for folder in checkpoint_folders(trainer):
        if folder.is_dir() and any(folder.rglob("*.ckpt")):
            rank_zero_info(
                f"{folder} has checkpoints of an earlier run. This run starts anew and may replace them: give "
                "--ckpt_path last to resume the earlier run, or another --run_folder to keep its checkpoints"
            )


def best_checkpoint(trainer: L.Trainer) -> str:
    """Return the best checkpoint of a run, which the newest checkpoint in the run's folder names.

    Lightning itself knows the best checkpoint only in the process that has trained.

    Raises:
        ConfigurationError: If the run has no ModelCheckpoint with a monitor, or no checkpoint that names the best.
    """
    watching = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor is not None]
    if not watching:
        raise ConfigurationError(
            "--ckpt_path best needs a metric to compare by, such as --checkpoint.monitor val_loss; take last"
        )
    newest, _ = newest_good_checkpoint(checkpoint_folders(trainer))
    if newest is None:
        raise ConfigurationError("--ckpt_path best: this run has no checkpoint yet; fit it first")
    states = describe_checkpoint(newest).get("callbacks")
    stored = states if isinstance(states, dict) else {}
    found = [_best_of(stored.get(callback.state_key), callback, Path(newest).parent) for callback in watching]
    best = next(filter(None, found), None)
    if best is None:
        raise ConfigurationError(f"--ckpt_path best: {str(newest)!r} names no best checkpoint that exists; take last")
    rank_zero_info(f"--ckpt_path best is {best}")
    return str(best)


def _best_of(state: object, callback: ModelCheckpoint, folder: Path) -> Path | None:
    """Return the best checkpoint that a stored state names, if it is in the folder of the run, moved or not."""
    path = state.get("best_model_path") if isinstance(state, dict) else None
    if not path or not isinstance(path, str) or "\0" in path:
        return None
    for candidate in (Path(path), folder / Path(path).name):
        if candidate.exists() and is_own_checkpoint(candidate, folder, callback.FILE_EXTENSION):
            return candidate
    return None


def last_checkpoint(trainer: L.Trainer, resumes: bool) -> str | None:
    """Return the newest intact checkpoint in the folder of a run, None if the folder has no checkpoint.

    A warning names each checkpoint that was skipped, with the reason. A run without any checkpoint starts at its first
    step, so that one command both starts and restarts the job of a scheduler.

    Args:
        trainer: The trainer, which knows the folders of the run's checkpoints.
        resumes: Whether training resumes from the checkpoint. An evaluation also takes a checkpoint of weights alone,
            and deletes no temporary file of a run that may still be training.

    Raises:
        ConfigurationError: If the folder has checkpoints and all of them are damaged.
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
    rank_zero_info(f"--ckpt_path last is {path}")
    return str(path)


@contextlib.contextmanager
def naming_checkpoint(module: BaseModule) -> Iterator[None]:
    """Name the checkpoint in errors that Lightning raises while it restores the checkpoint.

    Raises:
        ConfigurationError: In place of the error.
    """
    try:
        yield
    except (TrainingDiverged, DeviceMemoryExhausted, OSError):
        raise
    except Exception as error:
        if not raised_while_restoring(error) or str(module.resume_from) in str(error):
            raise
        if isinstance(error, ConfigurationError):
            raise ConfigurationError(f"checkpoint {module.resume_from!r}: {error}") from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ConfigurationError(
            f"checkpoint {module.resume_from!r} cannot be restored in this run: {reason}"
        ) from error


def raised_while_restoring(error: BaseException) -> bool:
    """Tell whether Lightning was restoring a checkpoint, and not training or evaluating, when an error was raised."""
    codes = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = [code.co_name for code in codes if code.co_filename == checkpoint_connector.__file__]
    return any(name.lstrip("_").startswith(("restore", "resume_start")) for name in names)
