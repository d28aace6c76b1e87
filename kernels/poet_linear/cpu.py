"""Gradients of two block rotations around a frozen weight from ``x, y, dL/dx, dL/dy``; README.md derives them."""

import torch
from torch import Tensor

from orthotrain.kernels.block_batches import inverse_transpose_times, solve_blocks, times_inverse_transpose
from orthotrain.kernels.block_rotate.cpu import contract


def invertible(norm: float) -> bool:
    """Tell whether ``R^-T`` is well-conditioned: below ``||E|| = 1/2`` the singular values of R are in (0.7, 1.23)."""
    return norm < 0.5


def input_gradient(
    x: Tensor, grad_x: Tensor, displacement: Tensor, deviation: Tensor | None, permutation: Tensor | None
) -> Tensor:
    """Return ``dL/dD_in = blocks(x^T dL/dx) R^-T``, ``(n, b, b)``.

    Args:
        x: Input ``(N, in)``.
        grad_x: ``dL/dx (N, in)``.
        displacement: ``D_in = R - I``, ``(n, b, b)``.
        deviation: ``E = R^T R - I`` if R is inverted by transposing, None if by solving.
        permutation: Of the columns, ``(in / g,)``, or None.
    """
    contraction, wide = _widened(contract(x, grad_x, displacement, permutation), displacement)
    if deviation is not None:
        return times_inverse_transpose(contraction, wide, deviation).to(displacement.dtype)
    return solve_blocks(_transposed(wide), contraction, left=False).to(displacement.dtype)


def output_gradient(
    y: Tensor, grad_y: Tensor, displacement: Tensor, deviation: Tensor | None, permutation: Tensor | None
) -> Tensor:
    """Return ``dL/dD_out = R^-T blocks(y^T dL/dy)``, ``(n, b, b)``; arguments as for :func:`input_gradient`."""
    contraction, wide = _widened(contract(y, grad_y, displacement, permutation), displacement)
    if deviation is not None:
        return inverse_transpose_times(contraction, wide, deviation).to(displacement.dtype)
    return solve_blocks(_transposed(wide), contraction).to(displacement.dtype)


def _widened(*blocks: Tensor) -> tuple[Tensor, ...]:
    return tuple(block.to(torch.promote_types(block.dtype, torch.float32)) for block in blocks)


def _transposed(displacement: Tensor) -> Tensor:
    """Return ``R^T = I + D^T``."""
    return displacement.mT + torch.eye(displacement.shape[-1], dtype=displacement.dtype, device=displacement.device)
