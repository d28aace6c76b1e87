"""What ranks must agree on before one of them stops."""

from typing import Any

import torch
import torch.distributed as dist


def on_any_rank(flag: bool, device: torch.device) -> bool:
    """Return whether ``flag`` is true on some rank: where one stops alone the others would wait for it for ever.

    One reduction of four bytes; every rank must call it, at the same place.

    Args:
        flag: What this rank says.
        device: A device that the process group reduces on.
    """
    return least_of_ranks(int(not flag), device) == 0


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
