"""Resuming: the newest complete checkpoint, another number of ranks, and the end of an epoch."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from orthotrain.checkpoints.reading import check_checkpoint, describe_checkpoint, newest_first
from orthotrain.checkpoints.shards import REST
from orthotrain.errors import ConfigurationError


def adapt_ranks(checkpoint: dict[str, Any], ranks: int) -> None:
    """Convert the position in the epoch, in place, to another number of ranks.

    After k batches on each of R ranks, the run has seen the first ``k * R`` batches of the epoch, on whichever rank. If
    ``accumulate_grad_batches`` is changed so that a step still has the same number of samples, the resumed run has the
    same losses, up to the rounding of the gradient sum.

    Args:
        checkpoint: A Lightning checkpoint. It is changed only if its data module has stored its number of ranks, as
            ``TextData`` and ``InstructionData`` do.
        ranks: World size of this run.

    Raises:
        ConfigurationError: The number of batches seen is not a multiple of ``ranks``.
    """
    loop = checkpoint.get("loops", {}).get("fit_loop", {})
    for loader in loop.get("state_dict", {}).get("combined_loader", []):
        before = loader.get("num_replicas", ranks) if isinstance(loader, dict) else ranks
        if before == ranks:
            continue
        seen = loader["batches"] * before
        if seen % ranks:
            raise ConfigurationError(
                f"the run of the checkpoint has seen {seen} batches of its epoch on {before} ranks, which is not a "
                f"multiple of {ranks}: resume on a number of ranks that divides {seen}"
            )
        loader["batches"], loader["num_replicas"] = seen // ranks, ranks
        progress = loop["epoch_loop.batch_progress"]["current"]
        more = progress["processed"] * before // ranks - progress["processed"]
        for name in progress:  # at the end of a batch "completed" is one less than "processed": keep the difference
            progress[name] += more


def forget_end_of_epoch(checkpoint: dict[str, Any]) -> bool:
    """Remove the mark that the last batch ended the epoch from a checkpoint, in place; return whether it was set."""
    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress", {})
    was, progress["is_last_batch"] = bool(progress.get("is_last_batch")), False
    return was


def begin_next_epoch(fit_loop: Any, was_over: bool) -> None:
    """Begin the next epoch if the resumed run has already seen all batches of the current epoch.

    Lightning decides this by a mark in the checkpoint, and so repeats the data of an epoch in a run that is resumed at
    the end of two successive epochs.

    Args:
        fit_loop: The fit loop of the trainer, reset for a resumed run.
        was_over: Whether the checkpoint was saved at the end of an epoch. It is used for data of unknown length.
    """
    if not fit_loop.restarted_mid_epoch:
        return
    seen, batches = fit_loop.epoch_loop.batch_progress.current.ready, fit_loop.max_batches
    if was_over if batches == float("inf") else seen >= batches:
        fit_loop.epoch_progress.increment_processed()
        fit_loop.epoch_progress.increment_completed()
        fit_loop.reset_restart_stage()


def newest_good_checkpoint(folders: Iterable[Path], resumes: bool = False) -> tuple[Path | None, list[str]]:
    """Find the newest complete checkpoint: the highest optimizer step, and of equal steps the last one written.

    Args:
        folders: Folders that are searched, as in :func:`newest_first`.
        resumes: Whether training will go on from the checkpoint. A checkpoint with nothing but weights is then skipped.

    Returns:
        The path, or None if there is no checkpoint; and one line with the reason for each skipped checkpoint, which is
        a newer one that is damaged, or one whose step cannot be read.

    Raises:
        ConfigurationError: There are checkpoints, but all were skipped; the message gives the reasons.
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
        reasons = skipped[:3] + ([f"and {len(skipped) - 3} more"] if len(skipped) > 3 else [])
        raise ConfigurationError(f"no checkpoint {'can be resumed' if resumes else 'is whole'}: {'; '.join(reasons)}")
    return None, []


def check_resumable(path: str | Path) -> None:
    """Check that a checkpoint has the state of a training run, and not only weights.

    Raises:
        ConfigurationError: The checkpoint has only weights; the message names the commands that take it.
    """
    if not is_local(path) or "lr_schedulers" in describe_checkpoint(path):
        return
    raise ConfigurationError(
        f"checkpoint {str(path)!r} has only weights (save_weights_only: true): fit cannot go on from it, but validate, "
        "predict and export take it, and CheckpointModel starts another run with its weights"
    )


def is_local(path: str | Path) -> bool:
    """Tell whether a checkpoint is on a file system of this host, and not on another one (``s3://``)."""
    return (Path(path) / REST if Path(path).is_dir() else Path(path)).is_file()
