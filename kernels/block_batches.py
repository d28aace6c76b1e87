"""Inverting the blocks of a nearly orthogonal rotation by transposing them; kernels/oft_linear/README.md derives it."""

import torch
from torch import Tensor


def gram_deviation(displacement: Tensor) -> Tensor:
    """Return ``E = R^T R - I = D + D^T + D^T D`` of ``D (n, b, b)``, in fp32 or wider: without I no digits cancel."""
    d = displacement.to(torch.promote_types(displacement.dtype, torch.float32))
    return torch.baddbmm(d, d.mT, d).add_(d.mT)


def largest(deviation: Tensor) -> float:
    """Return the norm of the block of ``E (n, b, b)`` that deviates most, 0 without blocks."""
    return float(torch.linalg.vector_norm(deviation, dim=(1, 2)).amax()) if deviation.numel() else 0.0


def inverts_by_transposing(norm: float, dtype: torch.dtype) -> bool:
    """Tell whether ``R (I - E)`` is ``R^-T`` to the rounding of ``dtype``: its relative error is ``||E||^2``."""
    return norm < torch.finfo(dtype).eps ** 0.5


def times_inverse_transpose(matrix: Tensor, displacement: Tensor, deviation: Tensor) -> Tensor:
    """Return ``S R^-T = S R (I - E)`` for ``S (n, b, b)``, in its dtype; see :func:`inverts_by_transposing`."""
    wide = matrix.to(deviation.dtype)
    product = torch.baddbmm(wide, wide, displacement.to(deviation.dtype))
    return torch.baddbmm(product, product, deviation, alpha=-1).to(matrix.dtype)


def inverse_transpose_times(matrix: Tensor, displacement: Tensor, deviation: Tensor) -> Tensor:
    """Return ``R^-T S = R (I - E) S`` for ``S (n, b, b)``, in its dtype; see :func:`inverts_by_transposing`."""
    wide = matrix.to(deviation.dtype)
    product = torch.baddbmm(wide, deviation, wide, alpha=-1)
    return torch.baddbmm(product, displacement.to(deviation.dtype), product).to(matrix.dtype)
