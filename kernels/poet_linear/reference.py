"""Gradients of two block rotations around a frozen weight from ``x, y, dL/dx, dL/dy``; README.md derives them."""

import torch
from torch import Tensor

from orthotrain.kernels.block_rotate.reference import contract
from orthotrain.kernels.oft_linear.reference import gram_deviation, times_inverse_transpose
from orthotrain.kernels.solve import solve_blocks


def deviation(displacement: Tensor) -> Tensor:
    """Return ``E = R^T R - I`` of ``D (n, b, b)``, in fp32 or wider: in 16 bits its digits would cancel."""
    return gram_deviation(displacement.to(torch.promote_types(displacement.dtype, torch.float32)))


def largest(deviation: Tensor) -> float:
    """Return the norm of the block of ``E (n, b, b)`` that deviates most, 0 without blocks."""
    return float(torch.linalg.vector_norm(deviation, dim=(1, 2)).amax()) if deviation.numel() else 0.0


def invertible(norm: float) -> bool:
    """Tell whether ``R^-T`` is well-conditioned: below ``||E|| = 1/2`` the singular values of R are in (0.7, 1.23)."""
    return norm < 0.5


def inverts_by_transposing(norm: float, dtype: torch.dtype) -> bool:
    """Tell whether ``R (I - E)`` is ``R^-T`` to the rounding of ``dtype``: its relative error is ``||E||^2``."""
    return norm < torch.finfo(dtype).eps ** 0.5


def input_gradient(
    x: Tensor, grad_x: Tensor, displacement: Tensor, deviation: Tensor | None, order: Tensor | None
) -> Tensor:
    """Return ``dL/dD_in = blocks(x^T dL/dx) R^-T``, ``(n, b, b)``.

    Args:
        x: Input ``(N, in)``.
        grad_x: ``dL/dx (N, in)``.
        displacement: ``D_in = R - I``, ``(n, b, b)``.
        deviation: Its :func:`deviation` where R is inverted by transposing, None where it is by solving.
        order: Order of the columns, ``(in / g,)``, or None.
    """
    contraction, wide = _widened(contract(x, grad_x, displacement, order), displacement)
    if deviation is not None:
        return times_inverse_transpose(contraction, wide, deviation).to(displacement.dtype)
    return solve_blocks(_transposed(wide), contraction, left=False).to(displacement.dtype)


def output_gradient(
    y: Tensor, grad_y: Tensor, displacement: Tensor, deviation: Tensor | None, order: Tensor | None
) -> Tensor:
    """Return ``dL/dD_out = R^-T blocks(y^T dL/dy)``, ``(n, b, b)``; arguments as for :func:`input_gradient`."""
    contraction, wide = _widened(contract(y, grad_y, displacement, order), displacement)
    if deviation is not None:
        return inverse_transpose_times(contraction, wide, deviation).to(displacement.dtype)
    return solve_blocks(_transposed(wide), contraction).to(displacement.dtype)


def inverse_transpose_times(matrix: Tensor, displacement: Tensor, deviation: Tensor) -> Tensor:
    """Return ``R^-T S = R (I - E) S`` for ``S (n, b, b)``, see :func:`inverts_by_transposing`."""
    product = torch.baddbmm(matrix, deviation, matrix, alpha=-1)
    return torch.baddbmm(product, displacement, product)


def _widened(*blocks: Tensor) -> tuple[Tensor, ...]:
    return tuple(block.to(torch.promote_types(block.dtype, torch.float32)) for block in blocks)


def _transposed(displacement: Tensor) -> Tensor:
    """Return ``R^T = I + D^T``."""
    return displacement.mT + torch.eye(displacement.shape[-1], dtype=displacement.dtype, device=displacement.device)
