"""The gradients on the GPU: the contraction of block_rotate, which reads through the permutation, and the skew part."""

import torch
from torch import Tensor

from orthotrain.kernels.ahead_of_time import Variant
from orthotrain.kernels.block_rotate import contraction
from orthotrain.kernels.skew.triton import skew_backward


def activation_gradient(x: Tensor, grad: Tensor, permutation: Tensor | None, blocks: int, block_size: int) -> Tensor:
    """Return dL/dgenerators of ``z = x @ R`` at R = I; see the reference for shapes."""
    x, grad = (t.reshape(-1, t.shape[-1]) for t in (x, grad))
    # in fp32, since the skew part is a difference of entries that may be much larger
    products = contraction.contract_blocks(x, grad, permutation, permutation, blocks, block_size, torch.float32)
    return skew_backward(products.mul_(2))


def row_gradient(weight: Tensor, grad: Tensor, permutation: Tensor | None, blocks: int, block_size: int) -> Tensor:
    """Return dL/dgenerators of ``R_out^T W`` at R_out = I; see the reference."""
    return activation_gradient(weight.mT, grad.mT, permutation, blocks, block_size)


def column_gradient(weight: Tensor, grad: Tensor, permutation: Tensor | None, blocks: int, block_size: int) -> Tensor:
    """Return dL/dgenerators of ``W R_in^T`` at R_in = I; see the reference."""
    return activation_gradient(grad, weight, permutation, blocks, block_size)


def aot_variants() -> list[Variant]:
    """Return the launches to compile ahead of time that block_rotate does not have: of columns, and sums in fp32."""
    return [
        contraction.contraction_variant(torch.bfloat16, 128, group=8),
        contraction.contraction_variant(torch.bfloat16, 128, group=8, columns_first=True),
        contraction.add_splits_variant(torch.float32),
    ]
