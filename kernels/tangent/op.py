"""The public ``tangent`` and ``tangent_linear``, whose backward forms the gradients of generators.

Both are autograd functions that torch.compile can trace: ``tangent`` returns a view of its input, which a custom op
must not do. The gradient of the generators is an operation.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from orthotrain.kernels.operation import operation
from orthotrain.kernels.outputs import Changes, unviewed
from orthotrain.kernels.tangent.scale import log_gradient, scaled


def _fake(left: Tensor, right: Tensor, permutation: Tensor | None, blocks: int, block_size: int) -> Tensor:
    dtype = torch.promote_types(left.dtype, torch.float32)
    return left.new_empty(blocks, block_size * (block_size - 1) // 2, dtype=dtype)


_gradient = operation("tangent_gradient", folder="tangent", fake=_fake)


class _Tangent(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, generators: Tensor, permutation: Tensor | None, block_size: int) -> Tensor:
        ctx.save_for_backward(x, permutation)
        ctx.blocks, ctx.block_size = generators.shape[0], block_size
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        x, permutation = ctx.saved_tensors
        (grad,) = grads
        gradient = _gradient(x, grad, permutation, ctx.blocks, ctx.block_size)
        return grad, gradient, None, None


class _TangentOutput(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        product: Tensor,
        x: Tensor,
        generators: Tensor | None,
        permutation: Tensor | None,
        block_size: int,
        log_scale: Tensor | None,
        again: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        kept = unviewed(scaled(product, log_scale, product.dtype))
        # in a trace, changes in place reach every alias; there a copy is free, since the compiler removes it
        y = kept.clone() if again is None else kept.data
        ctx.changes = None if again is None else Changes(y)
        ctx.save_for_backward(kept, x, permutation, log_scale)
        ctx.blocks, ctx.block_size, ctx.again = 0 if generators is None else generators.shape[0], block_size, again
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        y, x, permutation, log_scale = ctx.saved_tensors
        (grad,) = grads
        if ctx.changes is not None and ctx.changes.any():
            y = scaled(ctx.again(x), log_scale, grad.dtype)
        gradient = _gradient(y, grad, permutation, ctx.blocks, ctx.block_size) if ctx.blocks else None
        scale = None if log_scale is None else log_gradient(grad, y, log_scale)
        return scaled(grad, log_scale, grad.dtype), None, gradient, None, None, scale, None


class _TangentLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        out: Tensor | None,
        into: Tensor | None,
        permutation_out: Tensor | None,
        permutation_in: Tensor | None,
        sizes: tuple[int, int],
        log_scale: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, permutation_out, permutation_in, log_scale)
        ctx.blocks = tuple(0 if g is None else g.shape[0] for g in (out, into))
        ctx.sizes = sizes
        return unviewed(torch.nn.functional.linear(x, scaled(weight, log_scale, x.dtype)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        x, stored, permutation_out, permutation_in, log_scale = ctx.saved_tensors
        (grad,) = grads
        weight = scaled(stored, log_scale, x.dtype)
        rows = grad.reshape(-1, grad.shape[-1])
        # contracted to the diagonal blocks and dropped
        grad_weight = rows.mT @ x.reshape(-1, x.shape[-1])
        grad_x = (rows @ weight).view(x.shape) if ctx.needs_input_grad[0] else None
        (n_out, n_in), (b_out, b_in) = ctx.blocks, ctx.sizes
        # dL/dD_out = W G^T on its rows, dL/dD_in = G^T W on its columns (README.md, "Through the weight")
        out = _gradient(weight.mT, grad_weight.mT, permutation_out, n_out, b_out) if n_out else None
        into = _gradient(grad_weight, weight, permutation_in, n_in, b_in) if n_in else None
        scale = None if log_scale is None else log_gradient(grad_weight, weight, log_scale)
        return grad_x, None, out, into, None, None, None, scale


def tangent(x: Tensor, generators: Tensor, permutation: Tensor | None, block_size: int) -> Tensor:
    """Return ``x``; in backward, ``generators`` get the gradient of a block rotation of ``x`` at R = I.

    Args:
        x: Activations ``(..., d)``.
        generators: ``(n, b(b-1)/2)``, known to be zero, ``n * b <= d``.
        permutation: ``(d,)`` int64, or of groups, ``(d / g,)`` (:mod:`permutations`): the blocks lie on its first
            ``n * b`` positions. None for the natural order.
        block_size: Size b of a block.

    Returns:
        ``x`` itself, as a new view.
    """
    return _Tangent.apply(x, generators, permutation, block_size)


def tangent_output(
    product: Tensor,
    x: Tensor,
    generators: Tensor | None,
    permutation: Tensor | None,
    block_size: int,
    log_scale: Tensor | None,
    again: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return ``e^log_scale product``; in backward, generators and scale get their gradients as in :func:`tangent`.

    The result may be changed in place. Then the product is computed again in backward.

    Args:
        product: Product with the frozen weight ``(..., out)``; nothing else may read its memory.
        x: Its input ``(..., in)``.
        generators: As for :func:`tangent`, or None.
        permutation: As for :func:`tangent`.
        block_size: As for :func:`tangent`.
        log_scale: As for :func:`tangent_linear`.
        again: Computes the product from ``x``, without autocast.

    Returns:
        ``(..., out)`` in the memory of the product, or new with a scale.
    """
    recompute = None if torch.compiler.is_compiling() else again
    return _TangentOutput.apply(product, x, generators, permutation, block_size, log_scale, recompute)


def tangent_linear(
    x: Tensor,
    weight: Tensor,
    out: Tensor | None,
    into: Tensor | None,
    permutation_out: Tensor | None,
    permutation_in: Tensor | None,
    sizes: tuple[int, int],
    log_scale: Tensor | None = None,
) -> Tensor:
    """Return ``e^log_scale x @ weight.T``; in backward, generators and scale get their gradients through dL/dW.

    Args:
        x: ``(..., in)``.
        weight: Frozen ``(out, in)`` in the natural frame, cast to the dtype of ``x`` for each product.
        out: Generators of the output side ``(n, b(b-1)/2)``, known to be zero, or None.
        into: Generators of the input side likewise, or None.
        permutation_out: Permutation ``(out,)`` likewise.
        permutation_in: Permutation ``(in,)`` likewise.
        sizes: Block sizes of the output and of the input side.
        log_scale: Logarithm of a factor of the weight, ``(1,)`` in fp32 or wider, or None for 1.

    Returns:
        ``(..., out)``.
    """
    return _TangentLinear.apply(x, weight, out, into, permutation_out, permutation_in, sizes, log_scale)
