"""The memory that a process has held at most; a benchmark asks for it in a process for each thing that it measures."""

import torch

from orthotrain.devices.accelerators import peak_bytes


def peak_resident_mib() -> float:
    """Return the largest resident memory of this process so far, in MiB."""
    return (peak_bytes(torch.device("cpu")) or 0) / 2**20
