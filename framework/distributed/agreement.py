"""What ranks must agree on before one of them stops."""

from typing import Any

import torch
import torch.distributed as dist

from orthotrain.devices.host_reads import LateValues, read_waits


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
