"""Stage 2: kernels, layers and training on the device against fp64, and against the CPU."""

from collections.abc import Iterator

import torch

from gpu import kernel_checks, layer_checks, training_checks
from gpu.device import Gpu
from gpu.record import Case

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def cases(machine: Gpu) -> Iterator[Case]:
    """Yield training first, as it takes longest, then layers and kernels in every dtype.

    gpu.sh starts twelve processes, each of which runs every twelfth case. They share the folder of compiled kernels.
    """
    yield from training_checks.cases(machine)
    for dtype in DTYPES:
        yield from layer_checks.cases(machine, dtype)
    for dtype in DTYPES:
        yield from kernel_checks.cases(machine, dtype)
