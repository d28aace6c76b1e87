"""The OFT layer on the GPU: the rotation by its own kernels, the products by cuBLAS; ``cpu.py`` has the shapes.

Tokens are rotated in forward and backward: for the gradient through rotated rows of W the host would wait for a norm.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from orthotrain.kernels.block_rotate.contraction import contract_blocks
from orthotrain.kernels.block_rotate.triton import block_rotate_forward, rotate_scattered
from orthotrain.kernels.oft_linear.cpu import bias_gradient


def oft_linear_forward(x: Tensor, weight: Tensor, displacement: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``(x R) W^T + bias``."""
    rotated = block_rotate_forward(x, displacement, None, None)
    return F.linear(rotated, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def oft_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    displacement: Tensor,
    bias: Tensor | None,
    need_x: bool,
    need_displacement: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients for ``x``, ``displacement`` and ``bias``, None where not needed."""
    rows, grad_y = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    grad_rotated = torch.mm(grad_y, weight.to(grad.dtype))
    grad_x = grad_displacement = None
    if need_displacement:
        grad_displacement = contract_blocks(rows, grad_rotated, None, None, *displacement.shape[:2])
    if need_x:
        grad_x = rotate_scattered(grad_rotated, displacement.contiguous(), None, None, transposed=True).view(x.shape)
    return grad_x, grad_displacement, bias_gradient(grad_y, bias, need_bias)
