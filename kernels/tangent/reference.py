"""Gradients of block rotations at the identity, in plain PyTorch. The derivation is in README.md beside this file."""

import torch
from torch import Tensor

from orthotrain.kernels.block_rotate.reference import block_products, contract
from orthotrain.kernels.permutations import RowPermutation
from orthotrain.kernels.skew.reference import skew_backward


def activation_gradient(x: Tensor, grad: Tensor, permutation: Tensor | None, blocks: int, block_size: int) -> Tensor:
    """Return dL/dgenerators ``(n, b(b-1)/2)`` of ``z = x @ R`` at R = I, from ``x (N, d)`` and ``dL/dz (N, d)``.

    ``dL/dD_k = x_k^T dz_k`` on the permuted columns of block k, and D = 2Q to first order.

    Args:
        x: Rotated activations.
        grad: Gradient of the result.
        permutation: ``(d / g,)``: the blocks lie on its first ``n * b`` places. None for the natural
            one.
        blocks: Number of blocks n.
        block_size: Size b of a block.
    """
    x, grad = (t.reshape(-1, t.shape[-1]) for t in (x, grad))
    if permutation is None:
        return _generators_gradient(block_products(x.contiguous(), grad.contiguous(), blocks, block_size))
    like = x.new_empty(blocks, block_size, block_size, dtype=torch.promote_types(x.dtype, torch.float32))
    return _generators_gradient(contract(x, grad, like, permutation))


def row_gradient(weight: Tensor, grad: Tensor, permutation: Tensor | None, blocks: int, block_size: int) -> Tensor:
    """Return dL/dgenerators of ``R_out^T W`` at R_out = I, from ``W`` and ``dL/dW``, both ``(out, in)``.

    ``dL/dD_k = W_k dW_k^T`` on the permuted rows of block k.
    """
    rows, covered = RowPermutation(permutation, weight.shape[0]), slice(0, blocks * block_size)
    left, right = (rows.gather(t.contiguous(), covered).view(blocks, block_size, -1) for t in (weight, grad))
    return _generators_gradient(torch.bmm(left, right.mT))


def column_gradient(weight: Tensor, grad: Tensor, permutation: Tensor | None, blocks: int, block_size: int) -> Tensor:
    """Return dL/dgenerators of ``W R_in^T`` at R_in = I, from ``W`` and ``dL/dW``, both ``(out, in)``.

    ``dL/dD_k = dW_k^T W_k`` on the permuted columns of block k.
    """
    return activation_gradient(grad, weight, permutation, blocks, block_size)


def _generators_gradient(grad_displacement: Tensor) -> Tensor:
    """Return dL/dgenerators in fp32 or wider from dL/dD ``(n, b, b)``: the skew part of dL/dQ = 2 dL/dD."""
    dtype = torch.promote_types(grad_displacement.dtype, torch.float32)
    return skew_backward(grad_displacement.to(dtype)).mul_(2)
