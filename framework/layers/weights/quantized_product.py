"""Custom ops for products with a packed weight: the weight is unpacked for one product and not kept.

The ops are opaque: eager mode, autograd and torch.compile see one call, autocast has no effect inside, and only the
packed tensors are saved for backward. Each storage format registers one function that unpacks it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from orthotrain.kernels.operation import without_autocast
from orthotrain.kernels.outputs import unviewed

Unpack = Callable[[list[Tensor], int, torch.dtype], Tensor]

_formats: dict[str, Unpack] = {}


def storage_format(name: str) -> Callable[[Unpack], Unpack]:
    """Register the decorated ``unpack(stored, group_size, dtype) -> W (out, in)`` under the name of a format."""

    def decorate(unpack: Unpack) -> Unpack:
        assert name not in _formats
        _formats[name] = unpack
        return unpack

    return decorate


@torch.library.custom_op("orthotrain::dequantize", mutates_args=())
def dequantize(stored: list[Tensor], format: str, group_size: int, shape: list[int], dtype: torch.dtype) -> Tensor:
    """Unpack a weight; not differentiable.

    Args:
        stored: The packed tensors of the format, in its order.
        format: Name of the storage format.
        group_size: Values that share one scale.
        shape: ``[out, in]``.
        dtype: Floating dtype of the result; values are formed in fp32 and rounded once.

    Returns:
        A new ``W (out, in)``.
    """
    weight = _formats[format](stored, group_size, dtype)
    # the output of an op may not be one of its inputs
    return weight.clone() if any(weight is tensor for tensor in stored) else weight


@dequantize.register_fake
def _(stored: list[Tensor], format: str, group_size: int, shape: list[int], dtype: torch.dtype) -> Tensor:
    return stored[0].new_empty(shape, dtype=dtype)


@torch.library.custom_op("orthotrain::quantized_product", mutates_args=())
def quantized_product(
    x: Tensor, bias: Tensor | None, stored: list[Tensor], format: str, group_size: int, width: int, transposed: bool
) -> Tensor:
    """Return ``x @ W.T + bias`` in the dtype of ``x``; forward and backward each unpack ``W`` for one product.

    Differentiable in ``x`` (``grad @ W``) and in the bias; a gradient of ``W`` is never formed.

    Args:
        x: ``(..., in)``.
        bias: ``(out,)`` in the dtype of ``x``, or None.
        stored: See :func:`dequantize`.
        format: See :func:`dequantize`.
        group_size: See :func:`dequantize`.
        width: Width of the result: ``out``, or ``in`` if transposed.
        transposed: Whether the product is ``x @ W`` with ``x (..., out)``, as in backward.

    Returns:
        ``(..., width)``.
    """
    weight = _formats[format](stored, group_size, x.dtype)
    with without_autocast(x.device.type):
        return unviewed(F.linear(x, weight.mT if transposed else weight, bias))


@quantized_product.register_fake
def _(x: Tensor, bias: Any, stored: Any, format: str, group_size: int, width: int, transposed: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], width)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, bias, stored, ctx.format, ctx.group_size, _, ctx.transposed = inputs
    ctx.width = x.shape[-1]
    ctx.bias_needs_grad = bias is not None and bias.requires_grad
    ctx.save_for_backward(*stored)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    stored = list(ctx.saved_tensors)
    grad_x = quantized_product(grad, None, stored, ctx.format, ctx.group_size, ctx.width, not ctx.transposed)
    grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.bias_needs_grad else None
    return grad_x, grad_bias, [None] * len(stored), None, None, None, None


quantized_product.register_autograd(_backward, setup_context=_setup_context)
