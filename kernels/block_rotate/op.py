"""``orthotrain::block_rotate``: a torch custom op where somebody traces, a plain autograd function in eager mode."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from orthotrain.kernels.checks import check_blocks, check_permutation, debug_permutation, traced
from orthotrain.kernels.dispatch import implementation
from orthotrain.kernels.guard import guarded, returned


def _rotated(x: Tensor, displacement: Tensor, gather: Tensor | None, scatter: Tensor | None) -> Tensor:
    debug_permutation("block_rotate", "gather", gather)
    debug_permutation("block_rotate", "scatter", scatter)
    with guarded(x):
        return implementation(x, "block_rotate").block_rotate_forward(x, displacement, gather, scatter)


def _gradients(
    grad: Tensor,
    x: Tensor,
    displacement: Tensor,
    gather: Tensor | None,
    scatter: Tensor | None,
    need_x: bool,
    need_displacement: bool,
) -> tuple[Tensor | None, Tensor | None]:
    with guarded(x):
        backward = implementation(x, "block_rotate").block_rotate_backward
        return backward(grad, x, displacement, gather, scatter, need_x, need_displacement)


@torch.library.custom_op("orthotrain::block_rotate", mutates_args=())
def _block_rotate(x: Tensor, displacement: Tensor, gather: Tensor | None, scatter: Tensor | None) -> Tensor:
    return _rotated(x, displacement, gather, scatter)


@_block_rotate.register_fake
def _(x: Tensor, displacement: Tensor, gather: Tensor | None, scatter: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("orthotrain::block_rotate_backward", mutates_args=())
def _block_rotate_backward(
    grad: Tensor,
    x: Tensor,
    displacement: Tensor,
    gather: Tensor | None,
    scatter: Tensor | None,
    need_x: bool,
    need_displacement: bool,
) -> tuple[Tensor, Tensor]:
    grads = _gradients(grad, x, displacement, gather, scatter, need_x, need_displacement)
    return returned(grads[0], x), returned(grads[1], displacement)


@_block_rotate_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    displacement: Tensor,
    gather: Tensor | None,
    scatter: Tensor | None,
    need_x: bool,
    need_displacement: bool,
) -> tuple[Tensor, Tensor]:
    grad_x = x.new_empty(x.shape if need_x else 0)
    return grad_x, displacement.new_empty(displacement.shape if need_displacement else 0)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _traced_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    need_x, need_displacement, *_ = ctx.needs_input_grad
    grad_x, grad_displacement = _block_rotate_backward(grad, *ctx.saved_tensors, need_x, need_displacement)
    return (grad_x if need_x else None), (grad_displacement if need_displacement else None), None, None


_block_rotate.register_autograd(_traced_backward, setup_context=_setup_context)


class BlockRotateFunction(torch.autograd.Function):
    """The same in eager mode, where the machinery of a custom op with a gradient costs more than a small rotation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, displacement: Tensor, gather: Tensor | None, scatter: Tensor | None) -> Tensor:
        """See :func:`block_rotate`."""
        ctx.save_for_backward(x, displacement, gather, scatter)
        return _rotated(x, displacement, gather, scatter)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Return the gradients for ``x`` and the displacement that are needed."""
        need_x, need_displacement, *_ = ctx.needs_input_grad
        x, displacement, gather, scatter = ctx.saved_tensors
        gradients = _gradients(grad, x, displacement, gather, scatter, need_x, need_displacement)
        return *gradients, None, None


def block_rotate(
    x: Tensor, displacement: Tensor, gather: Tensor | None = None, scatter: Tensor | None = None
) -> Tensor:
    """Rotate blocks of the last axis: ``z = x[..., gather]``, ``z_k += z_k @ D_k``, ``y[..., scatter] = z``.

    A rotation in the frame of a permutation ``p`` is ``gather=p, scatter=p``; a layer that keeps its weight in the
    permuted frame needs only ``gather`` on its input side and ``scatter`` on its output side. Autocast does not reach
    inside.

    Args:
        x: Activations ``(..., d)``.
        displacement: ``D = R - I`` of ``n`` blocks, ``(n, b, b)``, ``n * b <= d``; same dtype and device as ``x``.
            The last ``d - n * b`` coordinates pass unchanged.
        gather: Permutation ``(d,)``, int64, or of groups of neighbors, ``(d / g,)`` (:mod:`permutations`), by
            which ``x`` is read; None for the identity.
        scatter: Permutation by which the result is written, or None.

    Returns:
        ``(..., d)`` in the dtype of ``x``; the sum ``x + x D`` is accumulated in fp32 for 16-bit inputs.

    Raises:
        ValueError: If dtypes or devices differ, the blocks are not square or do not fit in ``d``, or a permutation
            has another length or dtype; with ``ORTHOTRAIN_DEBUG=1`` also if it is no permutation.
    """
    width = x.shape[-1]
    check_blocks("block_rotate", "displacement", displacement, x, "x", width)
    check_permutation("block_rotate", "gather", gather, width, x)
    check_permutation("block_rotate", "scatter", scatter, width, x)
    rotated = _block_rotate if traced(x) else BlockRotateFunction.apply
    return rotated(x, displacement, gather, scatter)
