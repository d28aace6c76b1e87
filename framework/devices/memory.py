"""How much memory a device has, and how much of it this process has held at most."""

import os
import resource
import sys
from pathlib import Path

import torch


def total_bytes(device: torch.device) -> int | None:
    """Return the memory of a device; None for one without storage, or whose memory is not known here."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if device.type == "cpu" else None


def forget_peak(device: torch.device) -> None:
    """Begin anew to note the peak of a GPU; that of a process on the CPU counts from its start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """Return the most memory that tensors have held on a GPU, or that this process has held resident on the CPU.

    None for other devices.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if device.type != "cpu":
        return None
    if sys.platform == "linux":  # whose ru_maxrss is at least that of the process that started this one
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def describe_peak(device: torch.device, planned: int | None = None) -> str | None:
    """Return the peak in one line for the summary of a run; None where it is not known.

    Args:
        device: Of the run.
        planned: The bytes that ``orthotrain plan`` has counted for this run, if it has.
    """
    peak = peak_bytes(device)
    if peak is None:
        return None
    if device.type != "cuda":
        return f"{peak / 2**30:.2f} GiB resident, Python and its libraries included"
    plan = "" if planned is None else f", planned {planned / 2**30:.2f} GiB"
    return f"{peak / 2**30:.2f} GiB of {total_bytes(device) / 2**30:.2f}{plan}"  # type: ignore[operator]
