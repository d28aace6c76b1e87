"""Fold two block rotations into a weight, in plain PyTorch. The derivation is in README.md beside this file."""

import torch
from torch import Tensor

from orthotrain.kernels.block_rotate.reference import add_block_products, block_products
from orthotrain.kernels.permute import gather_columns, scatter_columns, scatter_rows


def fold_forward(
    weight: Tensor, d_out: Tensor, d_in: Tensor, rows: Tensor | None = None, columns: Tensor | None = None
) -> Tensor:
    """Return ``R_out^T W R_in^T`` with its rows and columns scattered to ``rows`` and ``columns``.

    Args:
        weight: ``(out, in)`` in the frame of the rotations.
        d_out: Displacements of the output side ``(n, b, b)``; ``n`` may be 0 (no rotation).
        d_in: Displacements of the input side ``(m, c, c)``; ``m`` may be 0.
        rows: Permutation ``(out,)``: row i of the result goes to ``rows[i]``. None keeps the frame.
        columns: Permutation ``(in,)`` likewise.

    Returns:
        A new tensor ``(out, in)``.
    """
    folded = rotate_rows(add_block_products(weight, d_in.mT), d_out)
    return scatter_columns(scatter_rows(folded, rows), columns)


def fold_backward(
    grad: Tensor, weight: Tensor, d_out: Tensor, d_in: Tensor, rows: Tensor | None, columns: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`fold_forward` for ``d_out`` and ``d_in``; only their diagonal blocks are formed."""
    grad = gather_columns(grad if rows is None else grad.index_select(0, rows), columns)
    half_folded = add_block_products(weight, d_in.mT)
    grad_out = torch.bmm(_row_blocks(half_folded, d_out), _row_blocks(grad, d_out).transpose(1, 2))
    grad_in = block_products(grad, rotate_rows(weight, d_out), d_in.shape[0], d_in.shape[-1])
    return grad_out, grad_in


def rotate_rows(weight: Tensor, d_out: Tensor) -> Tensor:
    """Return ``R_out^T W``: row blocks are contiguous, so this is one batched product into place."""
    out = torch.empty_like(weight)
    blocks = _row_blocks(weight, d_out)
    torch.baddbmm(blocks, d_out.mT, blocks, out=_row_blocks(out, d_out))
    covered = d_out.shape[0] * d_out.shape[-1]
    out[covered:] = weight[covered:]
    return out


def _row_blocks(matrix: Tensor, displacement: Tensor) -> Tensor:
    n, b = displacement.shape[0], displacement.shape[-1]
    return matrix[: n * b].view(n, b, matrix.shape[1])
