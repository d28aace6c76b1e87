"""Gradients of block rotations at the identity, in PyTorch for the CPU. README.md beside this file derives them."""

import torch
from torch import Tensor

from orthotrain.kernels.block_rotate.cpu import block_products, contract
from orthotrain.kernels.permutations import RowPermutation
from orthotrain.kernels.skew.cpu import skew_backward


def tangent_gradient_forward(
    left: Tensor, right: Tensor, permutation: Tensor | None, blocks: int, block_size: int
) -> Tensor:
    """Return dL/dgenerators ``(n, b(b-1)/2)``, in fp32 or wider, from ``dL/dD_k = left_k^T right_k``.

    Args:
        left: ``(..., d)``, such as the rotated activations.
        right: ``(..., d)``, such as the gradient at the same place.
        permutation: ``(d / g,)`` (:mod:`permutations`): the blocks lie on its first ``n * b`` positions. None for the
            natural order.
        blocks: Number of blocks n.
        block_size: Size b of a block.
    """
    if not left.is_contiguous() and left.mT.is_contiguous() and right.mT.is_contiguous():
        # columns of a transposed matrix are rows of the memory
        rows, covered = RowPermutation(permutation, left.shape[1]), slice(0, blocks * block_size)
        sides = (rows.gather(t.mT, covered).view(blocks, block_size, left.shape[0]) for t in (left, right))
        return _generators_gradient(torch.bmm(next(sides), next(sides).mT))
    left, right = (t.reshape(-1, t.shape[-1]) for t in (left, right))
    if permutation is None:
        return _generators_gradient(block_products(left.contiguous(), right.contiguous(), blocks, block_size))
    like = left.new_empty(blocks, block_size, block_size, dtype=torch.promote_types(left.dtype, torch.float32))
    return _generators_gradient(contract(left, right, like, permutation))


def _generators_gradient(grad_displacement: Tensor) -> Tensor:
    """Return dL/dgenerators in fp32 or wider from dL/dD ``(n, b, b)``: the skew part of dL/dQ = 2 dL/dD."""
    dtype = torch.promote_types(grad_displacement.dtype, torch.float32)
    return skew_backward(grad_displacement.to(dtype)).mul_(2)
