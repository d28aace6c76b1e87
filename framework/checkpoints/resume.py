"""Going on from a checkpoint: with another number of ranks, and from the newest file that is whole."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from orthotrain.callbacks.adapter_checkpoint import AdapterCheckpoint
from orthotrain.checkpoints.reading import check_checkpoint, describe_checkpoint, newest_first, step_of
from orthotrain.checkpoints.shards import REST
from orthotrain.console.progress import waiting
from orthotrain.distributed.agreement import of_all_ranks
from orthotrain.errors import ConfigurationError
from orthotrain.files.temporary import remove_leftovers


def adapt_ranks(checkpoint: dict[str, Any], ranks: int) -> None:
    """Rewrite, in place, how far a checkpoint's epoch has come for another number of ranks.

    After k batches on each of R ranks the first ``k * R`` batches of the epoch's order have been seen, whoever saw
    them. With ``accumulate_grad_batches`` changed so that a step has as many samples as before, the run goes on to the
    same losses (but for the order in which gradients are summed).

    Args:
        checkpoint: A Lightning checkpoint of a run whose training data says how many ranks read it (``TextData``,
            ``InstructionData``); any other is left as it is.
        ranks: World size of this run.

    Raises:
        ConfigurationError: If the batches seen do not divide over the ranks.
    """
    loop = checkpoint.get("loops", {}).get("fit_loop", {})
    places = loop.get("state_dict", {}).get("combined_loader", [])
    for place in places:
        before = place.get("num_replicas", ranks) if isinstance(place, dict) else ranks
        if before == ranks:
            continue
        seen = place["batches"] * before
        if seen % ranks:
            raise ConfigurationError(
                f"the checkpoint has seen {seen} batches of its epoch on {before} ranks, which do not divide over "
                f"{ranks}: resume on a number of ranks that divides {seen}"
            )
        place["batches"], place["num_replicas"] = seen // ranks, ranks
        progress = loop["epoch_loop.batch_progress"]["current"]
        more = progress["processed"] * before // ranks - progress["processed"]
        for name in progress:  # a checkpoint of the end of a batch counts one less as completed: keep that distance
            progress[name] += more


def forget_end_of_epoch(checkpoint: dict[str, Any]) -> bool:
    """Take from a checkpoint, in place, that its batch was the last one of the epoch; return whether it was."""
    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress", {})
    was, progress["is_last_batch"] = bool(progress.get("is_last_batch")), False
    return was


def begin_next_epoch(fit_loop: Any, was_over: bool) -> None:
    """Begin the next epoch if a resumed run has all batches of an epoch behind it.

    Lightning asks the checkpoint for that, and repeats the data of an epoch in a run that is resumed at the end of two
    epochs, one after the other.

    Args:
        fit_loop: The trainer's loop, reset for a run that goes on.
        was_over: Whether the checkpoint was the end of its epoch, for data whose number of batches is not known.
    """
    if not fit_loop.restarted_mid_epoch:
        return
    seen, batches = fit_loop.epoch_loop.batch_progress.current.ready, fit_loop.max_batches
    if was_over if batches == float("inf") else seen >= batches:
        fit_loop.epoch_progress.increment_processed()
        fit_loop.epoch_progress.increment_completed()
        fit_loop.reset_restart_stage()


def newest_good_checkpoint(folders: Iterable[Path], resumes: bool = False) -> tuple[Path | None, list[str]]:
    """Find the newest checkpoint, by the optimizer step that it was saved at, that reads as a whole.

    Of two checkpoints of one step the one that was written later is the newer one.

    Args:
        folders: Searched, with the folders in them, for ``*.ckpt``: files, and the folders of distributed checkpoints.
        resumes: Whether training is to go on from the checkpoint, for which weights alone are not enough.

    Returns:
        The path, None if there is no checkpoint at all; and a line, saying why, for each that was skipped: newer ones,
        and those that do not say their step.

    Raises:
        ConfigurationError: If there are checkpoints but none is good, naming each.
    """
    skipped: list[str] = []
    for path in newest_first(folders):
        try:
            check_checkpoint(path)
            if resumes:
                check_resumable(path)
        except ConfigurationError as error:
            skipped.append(str(error))
        else:
            return path, skipped
    if skipped:
        raise ConfigurationError(f"no checkpoint {'can be resumed' if resumes else 'is whole'}: {_listed(skipped)}")
    return None, []


def _listed(reasons: list[str], most: int = 3) -> str:
    more = [f"and {len(reasons) - most} more"] if len(reasons) > most else []
    return "; ".join([*reasons[:most], *more])


def check_resumable(path: str | Path) -> None:
    """Make sure that a checkpoint holds what training goes on from, and not the weights alone.

    Raises:
        ConfigurationError: Naming the checkpoint, and what can be done with it.
    """
    if not _lies_here(path) or "lr_schedulers" in describe_checkpoint(path):
        return
    raise ConfigurationError(
        f"checkpoint {str(path)!r} holds the weights alone (save_weights_only: true): fit cannot go on from it, but "
        "validate, predict and export take it, and CheckpointModel begins another run with its weights"
    )


def checkpoint_folders(trainer: L.Trainer) -> list[Path]:
    """Return where the callbacks of a trainer save their checkpoints."""
    folders = []
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            folders.append(checkpoint_folder_of(callback, trainer))
        elif isinstance(callback, AdapterCheckpoint):
            folders.append(Path(callback.dirpath or Path(trainer.log_dir or ".") / "adapters"))
    return folders


def checkpoint_folder_of(callback: ModelCheckpoint, trainer: L.Trainer) -> Path:
    """Return where a ``ModelCheckpoint`` saves."""
    # Lightning's own search, which only knows last*.ckpt, resolves it this way
    return Path(callback._ModelCheckpoint__resolve_ckpt_dir(trainer))  # type: ignore[attr-defined]


def written_folders(trainer: L.Trainer) -> list[Path]:
    """Return the folders that a run writes to: its own, and those of its checkpoints."""
    return [Path(trainer.log_dir or trainer.default_root_dir), *checkpoint_folders(trainer)]


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


def agree_on_checkpoint(path: str | None) -> None:
    """Make sure that all ranks go on from the same checkpoint; a collective, before any of them reads it.

    Hosts without a shared folder have different ones, or one has none: they would go on from different steps.

    Args:
        path: What this rank goes on from; None to begin.

    Raises:
        ConfigurationError: On every rank, saying what each sees.
    """
    own = None if path is None else (Path(path).name, _step_of(path))
    said = of_all_ranks(own)
    if all(other == said[0] for other in said):
        return
    seen = {rank: "no checkpoint" if s is None else f"{s[0]} of step {s[1]}" for rank, s in enumerate(said)}
    other = next(rank for rank in seen if said[rank] != said[0])
    raise ConfigurationError(
        f"ranks would go on from different checkpoints: rank 0 sees {seen[0]}, rank {other} sees {seen[other]}"
        f"{'' if path is None else f' (here {path!r})'}; put the run folder on a file system that all hosts share"
    )


def agree_on_step(step: int) -> None:
    """Make sure that all ranks begin with the same optimizer step; a collective.

    Raises:
        ConfigurationError: On every rank, saying which has which.
    """
    said = of_all_ranks(step)
    if any(other != said[0] for other in said):
        other = next(rank for rank, value in enumerate(said) if value != said[0])
        raise ConfigurationError(
            f"ranks begin with different steps: rank 0 at {said[0]}, rank {other} at {said[other]}; give all of them "
            "the same checkpoint"
        )


def _step_of(path: str) -> int | None:
    """Return the step of a checkpoint, without reading its tensors; None of one that lies elsewhere (``s3://``)."""
    return step_of(path) if _lies_here(path) else None


def _lies_here(path: str | Path) -> bool:
    return (Path(path) / REST if Path(path).is_dir() else Path(path)).is_file()
