"""The product with a frozen weight behind a block rotation, in PyTorch for the CPU; README.md derives its gradients."""

import torch
from torch import Tensor
from torch.nn import functional as F

from orthotrain.kernels.block_batches import (
    gram_deviation,
    inverts_by_transposing,
    largest_norm,
    times_inverse_transpose,
)
from orthotrain.kernels.block_rotate.cpu import add_block_products, block_products, block_rotate_forward


def rotates_weight(tokens: int, out_features: int) -> bool:
    """Tell whether the rows of ``W`` are rotated instead of the tokens.

    A row of ``W`` costs as much as a token (measured on the CPU, 1 thread, fp32, 256 wide, b = 32: 0.26 us), so the
    side with fewer rows is cheaper. It also touches less memory.
    """
    return tokens > out_features


def oft_linear_forward(x: Tensor, weight: Tensor, displacement: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``(x R) W^T + bias`` with ``R = I + Diag(D_1 .. D_n)``; the rotated matrix is dropped at once.

    Args:
        x: Input ``(..., in)``.
        weight: Frozen weight ``(out, in)``, cast to the dtype of ``x``.
        displacement: ``D = R - I``, ``(n, b, b)`` with ``n * b <= in``, dtype of ``x``.
        bias: ``(out,)``, cast to the dtype of ``x``, or None.

    Returns:
        A new tensor ``(..., out)``.
    """
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    # x keeps its shape, as in nn.Linear: for another shape F.linear may round in another order
    if rotates_weight(x.numel() // x.shape[-1], weight.shape[0]):
        return F.linear(x, fold_weight(weight, displacement), bias)
    return F.linear(block_rotate_forward(x, displacement, None, None), weight, bias)


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
    """Return the gradients for ``x (..., in)``, ``displacement (n, b, b)`` and ``bias (out,)``, None where not needed.

    There are two routes. One forms ``W R^T``, whose product with the gradient is ``dL/dx`` already; the other forms
    the product with ``W`` and rotates it last. The first must undo a rotation, which is exact to rounding only if ``R``
    is close to orthogonal.
    """
    rows, grad_y = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    weight, grad_bias = weight.to(grad.dtype), bias_gradient(grad_y, bias, need_bias)
    blocks, block_size = displacement.shape[:2]
    grad_displacement = None
    if need_x and rotates_weight(rows.shape[0], weight.shape[0]):
        deviation = gram_deviation(displacement) if need_displacement else None
        if deviation is None or inverts_by_transposing(largest_norm(deviation), x.dtype):
            grad_x = torch.mm(grad_y, fold_weight(weight, displacement))
            if deviation is not None:
                contraction = block_products(rows, grad_x, blocks, block_size)
                grad_displacement = times_inverse_transpose(contraction, displacement, deviation)
            return grad_x.view(x.shape), grad_displacement, grad_bias
    grad_rotated = torch.mm(grad_y, weight)
    if need_displacement:
        grad_displacement = block_products(rows, grad_rotated, blocks, block_size)
    if not need_x:
        return None, grad_displacement, grad_bias
    grad_x = add_block_products(grad_rotated, displacement.mT.contiguous()).view(x.shape)
    return grad_x, grad_displacement, grad_bias


def bias_gradient(grad_y: Tensor, bias: Tensor | None, needed: bool) -> Tensor | None:
    """Return the sum of ``dL/dy (N, out)`` over rows in the dtype of the bias, None where it is not needed."""
    return grad_y.sum(0).to(bias.dtype) if needed and bias is not None else None


def fold_weight(weight: Tensor, displacement: Tensor) -> Tensor:
    """Return ``W R^T`` ``(out, in)`` in the dtype of both."""
    return add_block_products(weight.contiguous(), displacement.mT)
