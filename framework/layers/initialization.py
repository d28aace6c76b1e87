"""Initial values of a frozen weight that is never trained: its spectrum is kept for the whole run."""

import math
from typing import Literal

import torch
from torch import Tensor

from orthotrain.errors import check_choice

Initialization = Literal["normalized", "uniform", "xavier", "standard", "keep"]


@torch.no_grad()
def initialize_(weight: Tensor, scheme: Initialization, generator: torch.Generator, gain: float = 1.0) -> None:
    """Fill ``weight (out, in)`` in place (arXiv:2506.08001, section 4: the normalised Gaussian is the best).

    Args:
        weight: Filled in its own dtype; drawn in fp32 on the CPU, so that every device and rank holds the same.
        scheme: ``normalized``: Gaussian rows divided by their norm. ``uniform``: all singular values 1, the orthogonal
            factor of a Gaussian. ``xavier``: Gaussian of variance ``2 / (out + in)``. ``standard``: Gaussian of
            standard deviation 0.02. ``keep``: leave it (for pretrained weights), but for the gain.
        generator: CPU generator.
        gain: Factor of all values, and so of all singular values.

    Raises:
        ConfigurationError: If the scheme is unknown.
    """
    check_choice("init", scheme, Initialization)
    if weight.is_meta:
        return
    if scheme == "keep":
        weight.mul_(gain)
        return
    values = torch.randn(weight.shape, generator=generator, dtype=torch.float32, device=generator.device)
    match scheme:
        case "normalized":
            values /= values.norm(dim=1, keepdim=True)
        case "uniform":
            values = polar_factor(values)
        case "xavier":
            values *= math.sqrt(2 / sum(weight.shape))
        case "standard":
            values *= 0.02
    weight.copy_(values * gain)


def polar_factor(matrix: Tensor) -> Tensor:
    """Return ``U V^T`` of ``matrix (m, n) = U S V^T``: orthonormal rows or columns, whichever are fewer."""
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ right
