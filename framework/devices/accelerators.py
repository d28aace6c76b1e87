"""Checks whether a GPU can run a network, and reads the memory of a device."""

import os
import resource
import sys
from pathlib import Path

import torch

from orthotrain.errors import ConfigurationError


def check_device(device: torch.device, precision: str) -> None:
    """Refuse a GPU for which PyTorch has no kernels, or that cannot compute in the precision of the run.

    Args:
        device: Device of the run. Every device that is not a CUDA GPU passes.
        precision: The trainer's ``precision``, such as ``bf16-mixed``.

    Raises:
        ConfigurationError: The message names the GPU, its compute capability and what would work.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    found = f"{name} has compute capability {_dotted(capability)}"
    oldest = oldest_capability(torch.cuda.get_arch_list())
    if oldest is not None and capability < oldest:
        raise ConfigurationError(
            f"{found}, and this build of PyTorch ({torch.__version__}) has kernels from {_dotted(oldest)} on: take "
            "--trainer.accelerator cpu, or a build of PyTorch for this GPU"
        )
    if precision.startswith("bf16") and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigurationError(
            f"precision={precision!r}: {found}, and bf16 needs 8.0: take --trainer.precision 16-mixed or 32-true"
        )


def oldest_capability(architectures: list[str]) -> tuple[int, int] | None:
    """Return the lowest compute capability of a list such as ``["sm_75", "sm_120", "compute_120"]``, or None."""
    numbers = [name.partition("_")[2].rstrip("af") for name in architectures]
    return min(((int(number[:-1]), int(number[-1])) for number in numbers if number.isdigit()), default=None)


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


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
