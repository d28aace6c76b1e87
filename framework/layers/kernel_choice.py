"""Kernels that were asked for and cannot run: refused where a layer or a run is set up, before anything is computed."""

import torch

from orthotrain.errors import ConfigurationError
from orthotrain.kernels.dispatch import check_possible


def check_kernels(device: torch.device | None = None) -> None:
    """Refuse an explicit ``triton`` that this machine, or a device of it, cannot meet.

    Raises:
        ConfigurationError: Saying why and what would run.
    """
    try:
        check_possible(device)
    except ValueError as error:
        raise ConfigurationError(str(error)) from error
