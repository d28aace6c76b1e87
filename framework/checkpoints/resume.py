"""Going on from a checkpoint: with another number of ranks, and from the newest file that is whole."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from orthotrain.checkpoints.reading import check_checkpoint, describe_checkpoint, newest_first
from orthotrain.checkpoints.shards import REST
from orthotrain.errors import ConfigurationError


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
    if not lies_here(path) or "lr_schedulers" in describe_checkpoint(path):
        return
    raise ConfigurationError(
        f"checkpoint {str(path)!r} holds the weights alone (save_weights_only: true): fit cannot go on from it, but "
        "validate, predict and export take it, and CheckpointModel begins another run with its weights"
    )


def lies_here(path: str | Path) -> bool:
    """Tell whether a checkpoint is on a file system of this host, and not elsewhere (``s3://``)."""
    return (Path(path) / REST if Path(path).is_dir() else Path(path)).is_file()
