"""Folding rotations into a weight by the kernels of the block rotation; derivation in README.md beside this file.

Rows of ``W`` are rotated as the columns of ``W^T``, which only changes strides. So each side is one launch, and a
scatter of rows is free; only columns need a pass of their own.
"""

import torch
from torch import Tensor

from orthotrain.kernels.block_rotate.contraction import contract_blocks
from orthotrain.kernels.block_rotate.triton import gathered, rotate, rotate_scattered


def fold_forward(
    weight: Tensor,
    d_out: Tensor | None,
    d_in: Tensor | None,
    permutation_out: Tensor | None,
    permutation_in: Tensor | None,
) -> Tensor:
    """Return ``R_out^T W R_in^T`` with its rows and columns scattered; ``cpu.py`` has the shapes."""
    weight = weight.contiguous()
    half_folded = rotate_scattered(weight, _blocks(d_in, weight), None, permutation_in, transposed=True)
    return rotate_rows(half_folded, _blocks(d_out, weight), permutation_out)


def fold_backward(
    grad: Tensor,
    weight: Tensor,
    d_out: Tensor | None,
    d_in: Tensor | None,
    permutation_out: Tensor | None,
    permutation_in: Tensor | None,
    need_out: bool = True,
    need_in: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients for ``d_out`` and ``d_in`` if needed.

    At any time one half-folded weight lives, beside the permuted gradient.
    """
    weight = weight.contiguous()
    grad, permutation_in = gathered(grad, permutation_in)
    grad_out = grad_in = None
    if d_out is not None and need_out:
        # A permutation of the columns common to both operands drops out of the contraction over columns.
        half_folded = rotate_scattered(weight, _blocks(d_in, weight), None, permutation_in, transposed=True)
        grad_out = contract_blocks(half_folded.mT, grad.mT, None, permutation_out, d_out.shape[0], d_out.shape[-1])
        del half_folded
    if d_in is not None and need_in:
        half_folded = rotate_rows(weight, _blocks(d_out, weight), permutation_out)
        grad_in = contract_blocks(grad, half_folded, permutation_in, None, d_in.shape[0], d_in.shape[-1])
    return grad_out, grad_in


def rotate_rows(weight: Tensor, d_out: Tensor, permutation: Tensor | None) -> Tensor:
    """Return ``R_out^T W`` with row ``i`` moved to ``permutation[i]``."""
    out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    rotate(weight.mT, d_out, None, permutation, out.mT)
    return out


def _blocks(displacement: Tensor | None, weight: Tensor) -> Tensor:
    """Return contiguous blocks for a kernel; zero blocks where there is no rotation."""
    return weight.new_empty(0, 1, 1) if displacement is None else displacement.contiguous()
