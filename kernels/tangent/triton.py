"""The gradients on the GPU: the contraction of block_rotate, which reads by the permutation, then the skew part."""

import torch
from torch import Tensor

from orthotrain.kernels.block_rotate import contraction
from orthotrain.kernels.skew.triton import skew_backward


def tangent_gradient_forward(
    left: Tensor, right: Tensor, permutation: Tensor | None, blocks: int, block_size: int
) -> Tensor:
    """Return dL/dgenerators ``(n, b(b-1)/2)`` in fp32; ``cpu.py`` has the shapes."""
    left, right = (t.reshape(-1, t.shape[-1]) for t in (left, right))
    # in fp32, since the skew part is a difference of entries that may be much larger
    products = contraction.contract_blocks(left, right, permutation, permutation, blocks, block_size, torch.float32)
    return skew_backward(products.mul_(2))
