"""The definition of the gradients at the identity, by autograd: ``D = 2Q`` to first order, at Q = 0."""

import torch
from torch import Tensor

from orthotrain.kernels.block_rotate.naive import block_rotate
from orthotrain.kernels.skew.naive import skew


def tangent_gradient(left: Tensor, right: Tensor, permutation: Tensor | None, blocks: int, block_size: int) -> Tensor:
    """Return dL/dgenerators, ``(n, b(b-1)/2)``, of ``z = left R`` at R = I, where ``dL/dz = right``."""
    generators = left.new_zeros(blocks, block_size * (block_size - 1) // 2, requires_grad=True)
    with torch.enable_grad():
        z = block_rotate(left.detach(), 2 * skew(generators, block_size), permutation, permutation)
    return torch.autograd.grad(z, generators, right)[0]
