"""The memory of a device, and the peak of the memory that this process has used."""

import os
import resource
import sys
from pathlib import Path

import torch


def total_bytes(device: torch.device) -> int | None:
    """Return the memory of a device in bytes; None if it is not known."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if device.type == "cpu" else None


def forget_peak(device: torch.device) -> None:
    """Reset the peak of a GPU. The peak of a process on the CPU counts from its start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """Return the peak bytes of tensors on a GPU, or the peak resident bytes of this process on the CPU.

    Other devices return None.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if device.type != "cpu":
        return None
    if sys.platform == "linux":  # on Linux ru_maxrss starts at the value of the parent process
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def describe_peak(device: torch.device, planned: int | None = None) -> str | None:
    """Return the peak as text for the summary of a run; None if it is not known.

    Args:
        device: Device of the run.
        planned: The planned bytes of the run, None if the run was not planned.
    """
    peak = peak_bytes(device)
    if peak is None:
        return None
    if device.type != "cuda":
        return f"{peak / 2**30:.2f} GiB resident, Python and its libraries included"
    plan = "" if planned is None else f", planned {planned / 2**30:.2f} GiB"
    return f"{peak / 2**30:.2f} GiB of {total_bytes(device) / 2**30:.2f}{plan}"  # type: ignore[operator]
