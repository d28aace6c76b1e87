"""Initial values of a frozen weight, whose singular values stay for the whole run, up to rounding."""

import math
from typing import Literal

import torch
from torch import Tensor

from orthotrain.errors import check_choice

Initialization = Literal["normalized", "uniform", "xavier", "standard", "keep"]


@torch.no_grad()
def initialize_(weight: Tensor, scheme: Initialization, generator: torch.Generator, gain: float = 1.0) -> None:
    """Fill ``weight (out, in)`` in place (arXiv:2506.08001, section 4: the normalized Gaussian is the best).

    Args:
        weight: Filled in its own dtype; the values are drawn in fp32 on the device of the generator.
        scheme: ``normalized``: Gaussian rows divided by their norm. ``uniform``: all singular values 1, the orthogonal
            factor of a Gaussian matrix. ``xavier``: Gaussian of variance ``2 / (out + in)``. ``standard``: Gaussian of
            standard deviation 0.02. ``keep``: the present values (of pretrained weights), times the gain.
        generator: A random generator of the CPU, which gives the same values on every device, or of the device of the
            weight.
        gain: Factor of all values and singular values.

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
            values = orthogonal_factor(values)
        case "xavier":
            values *= math.sqrt(2 / sum(weight.shape))
        case "standard":
            values *= 0.02
    weight.copy_(values.mul_(gain))


def orthogonal_factor(matrix: Tensor) -> Tensor:
    """Return orthonormal rows or columns, whichever are fewer, with the same span as in ``matrix (m, n)``.

    The result is Q of a QR decomposition with a positive diagonal of R. For a Gaussian matrix Q has the Haar
    distribution, like the polar factor (Mezzadri, 2007), but needs no singular value decomposition.
    """
    if matrix.shape[0] < matrix.shape[1]:
        return orthogonal_factor(matrix.T).T
    orthonormal, triangular = torch.linalg.qr(matrix)
    return torch.where(triangular.diagonal() < 0, -orthonormal, orthonormal)
