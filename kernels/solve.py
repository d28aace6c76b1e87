"""Solving small systems, one for each block of a rotation."""

import torch
from torch import Tensor

# Wide blocks on a CPU are solved one after another, each with all threads: of a batch of systems wider than LAPACK's
# panel MKL exchanges the wrong rows in torch 2.13 when there is more than one thread ("Parameter 6 ... SLASWP").
WIDEST_BATCHED_ON_CPU = 128


def solve_blocks(systems: Tensor, right: Tensor, left: bool = True) -> Tensor:
    """Return ``A_k^-1 B_k``, or ``B_k A_k^-1`` if not ``left``, ``(n, b, b)``.

    The systems must be regular: nothing checks it, which would wait for the device.

    Args:
        systems: ``A (n, b, b)``, fp32 or fp64.
        right: ``B (n, b, b)`` of the same dtype.
        left: On which side of B the inverse stands.
    """
    if systems.device.type == "cpu" and systems.shape[-1] > WIDEST_BATCHED_ON_CPU and systems.shape[0]:
        pairs = zip(systems, right, strict=True)
        return torch.stack([torch.linalg.solve_ex(a, b, left=left)[0] for a, b in pairs])
    return torch.linalg.solve_ex(systems, right, left=left)[0]
