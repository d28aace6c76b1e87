"""What ranks must agree on before one of them stops."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from orthotrain.checkpoints.reading import step_of
from orthotrain.checkpoints.resume import is_local
from orthotrain.devices.host_reads import LateValues, read_waits
from orthotrain.errors import ConfigurationError


def on_any_rank(flag: bool, device: torch.device) -> bool:
    """Return whether ``flag`` is true on some rank: where one stops alone the others would wait for it for ever.

    One reduction of four bytes; every rank must call it, at the same place.

    Args:
        flag: What this rank says.
        device: A device that the process group reduces on.
    """
    return least_of_ranks(int(not flag), device) == 0


class LateAgreement:
    """:func:`on_any_rank` for a flag that stays set, asked at every step: on a device no step waits for the answer."""

    def __init__(self) -> None:
        self._said: LateValues | None = None

    def on_any_rank(self, flag: bool, device: torch.device) -> bool:
        """Return whether ``flag`` is true on some rank: now on a CPU, at the call before on a device.

        Every rank must call it, at the same place.
        """
        if not (dist.is_available() and dist.is_initialized()) or not read_waits(device):
            return on_any_rank(flag, device)
        said = torch.full((), int(not flag), dtype=torch.int32, device=device)
        dist.all_reduce(said, dist.ReduceOp.MIN)
        before, self._said = self._said, LateValues(said)
        return before is not None and before.tolist() == 0


def least_of_ranks(count: int, device: torch.device) -> int:
    """Return the smallest ``count`` of all ranks; every rank must call it, at the same place."""
    if not (dist.is_available() and dist.is_initialized()):
        return count
    said = torch.tensor(count, dtype=torch.int32, device=device)
    dist.all_reduce(said, dist.ReduceOp.MIN)
    return int(said)


def of_all_ranks(value: Any) -> list[Any]:
    """Return what each rank says, in their order; every rank must call it, at the same place."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    said = [None] * dist.get_world_size()
    dist.all_gather_object(said, value)
    return said


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
    return step_of(path) if is_local(path) else None
