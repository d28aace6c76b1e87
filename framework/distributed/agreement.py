"""Comparing values of all ranks, so that no rank stops alone while the others wait for it forever."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from orthotrain.checkpoints.reading import step_of
from orthotrain.checkpoints.resume import is_local
from orthotrain.devices.host_reads import LateValues, read_waits
from orthotrain.errors import ConfigurationError


def least_of_ranks(count: int, device: torch.device) -> int:
    """Return the smallest ``count`` of all ranks; every rank must call this at the same point."""
    return count if not _has_ranks() else int(_reduced_minimum(count, device))


def on_any_rank(flag: bool, device: torch.device) -> bool:
    """Return whether ``flag`` is true on any rank; every rank must call this at the same point.

    One reduction of four bytes.

    Args:
        flag: The flag of this rank.
        device: A device on which the process group reduces.
    """
    return least_of_ranks(int(not flag), device) == 0


class LateAgreement:
    """:func:`on_any_rank` for a flag that stays set, asked at every step: on a device no step waits for the answer."""

    def __init__(self) -> None:
        self._reduced: LateValues | None = None

    def on_any_rank(self, flag: bool, device: torch.device) -> bool:
        """Return whether ``flag`` is true on any rank: on a CPU now, on a device at the call before."""
        if not _has_ranks() or not read_waits(device):
            return on_any_rank(flag, device)
        previous, self._reduced = self._reduced, LateValues(_reduced_minimum(int(not flag), device))
        return previous is not None and previous.tolist() == 0


def agree_on_checkpoint(path: str | None) -> None:
    """Check that all ranks resume from the same checkpoint; every rank must call this before it reads the checkpoint.

    Hosts without a shared folder have different checkpoints, or only some hosts have one, and the ranks would resume
    from different steps.

    Args:
        path: The checkpoint from which this rank resumes; None to begin.

    Raises:
        ConfigurationError: On every rank, with what two differing ranks see.
    """
    own = None if path is None else (Path(path).name, step_of(path) if is_local(path) else None)
    if differing := _first_difference(own):
        seen = ["no checkpoint" if s is None else f"{s[0]} of step {s[1]}" for s in (differing[0], differing[2])]
        raise ConfigurationError(
            f"ranks would go on from different checkpoints: rank 0 sees {seen[0]}, rank {differing[1]} sees {seen[1]}"
            f"{'' if path is None else f' (here {path!r})'}; put the run folder on a file system that all hosts share"
        )


def agree_on_step(step: int) -> None:
    """Check that all ranks begin with the same optimizer step; every rank must call this.

    Raises:
        ConfigurationError: On every rank, with the steps of two differing ranks.
    """
    if differing := _first_difference(step):
        first, rank, other = differing
        raise ConfigurationError(
            f"ranks begin with different steps: rank 0 at {first}, rank {rank} at {other}; give all of them the same "
            "checkpoint"
        )


def _first_difference(value: Any) -> tuple[Any, int, Any] | None:
    """Return rank 0's value, and the first rank with another value and that value; None if all ranks have the same."""
    if not _has_ranks():
        return None
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return next(((values[0], rank, other) for rank, other in enumerate(values) if other != values[0]), None)


def _reduced_minimum(count: int, device: torch.device) -> torch.Tensor:
    minimum = torch.full((), count, dtype=torch.int32, device=device)
    dist.all_reduce(minimum, dist.ReduceOp.MIN)
    return minimum


def _has_ranks() -> bool:
    return dist.is_available() and dist.is_initialized()
