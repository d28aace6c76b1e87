"""Checks, before the network is built, whether a GPU can run it."""

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
