"""``orthotrain::fold``: a torch custom op where somebody traces, a plain autograd function in eager mode.

Backward contracts the weight gradient to diagonal blocks and drops it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from orthotrain.kernels.checks import check_blocks, check_permutation, debug_permutation, traced
from orthotrain.kernels.dispatch import implementation
from orthotrain.kernels.guard import guarded, returned


def _folded(
    weight: Tensor, d_out: Tensor, d_in: Tensor, permutation_out: Tensor | None, permutation_in: Tensor | None
) -> Tensor:
    debug_permutation("fold", "permutation_out", permutation_out)
    debug_permutation("fold", "permutation_in", permutation_in)
    with guarded(weight):
        return implementation(weight, "fold").fold_forward(
            weight.contiguous(), d_out, d_in, permutation_out, permutation_in
        )


def _gradients(
    grad: Tensor,
    weight: Tensor,
    d_out: Tensor,
    d_in: Tensor,
    permutation_out: Tensor | None,
    permutation_in: Tensor | None,
    need_out: bool,
    need_in: bool,
) -> tuple[Tensor | None, Tensor | None]:
    with guarded(weight):
        backward = implementation(weight, "fold").fold_backward
        return backward(grad, weight.contiguous(), d_out, d_in, permutation_out, permutation_in, need_out, need_in)


@torch.library.custom_op("orthotrain::fold", mutates_args=())
def _fold(
    weight: Tensor, d_out: Tensor, d_in: Tensor, permutation_out: Tensor | None, permutation_in: Tensor | None
) -> Tensor:
    return _folded(weight, d_out, d_in, permutation_out, permutation_in)


@_fold.register_fake
def _(
    weight: Tensor, d_out: Tensor, d_in: Tensor, permutation_out: Tensor | None, permutation_in: Tensor | None
) -> Tensor:
    return weight.new_empty(weight.shape)


@torch.library.custom_op("orthotrain::fold_backward", mutates_args=())
def _fold_backward(
    grad: Tensor,
    weight: Tensor,
    d_out: Tensor,
    d_in: Tensor,
    permutation_out: Tensor | None,
    permutation_in: Tensor | None,
    need_out: bool,
    need_in: bool,
) -> tuple[Tensor, Tensor]:
    grads = _gradients(grad, weight, d_out, d_in, permutation_out, permutation_in, need_out, need_in)
    return returned(grads[0], d_out), returned(grads[1], d_in)


@_fold_backward.register_fake
def _(
    grad: Tensor,
    weight: Tensor,
    d_out: Tensor,
    d_in: Tensor,
    permutation_out: Tensor | None,
    permutation_in: Tensor | None,
    need_out: bool,
    need_in: bool,
) -> tuple[Tensor, Tensor]:
    return d_out.new_empty(d_out.shape if need_out else 0), d_in.new_empty(d_in.shape if need_in else 0)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _traced_backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, Tensor | None, None, None]:
    _, need_out, need_in, *_ = ctx.needs_input_grad
    grad_out, grad_in = _fold_backward(grad, *ctx.saved_tensors, need_out, need_in)
    return None, (grad_out if need_out else None), (grad_in if need_in else None), None, None


_fold.register_autograd(_traced_backward, setup_context=_setup_context)


class FoldFunction(torch.autograd.Function):
    """The same in eager mode, without the machinery of a custom op with a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        d_out: Tensor,
        d_in: Tensor,
        permutation_out: Tensor | None,
        permutation_in: Tensor | None,
    ) -> Tensor:
        """See :func:`fold`."""
        ctx.save_for_backward(weight, d_out, d_in, permutation_out, permutation_in)
        return _folded(weight, d_out, d_in, permutation_out, permutation_in)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, Tensor | None, None, None]:
        """Return the gradients for the displacements that need them."""
        _, need_out, need_in, *_ = ctx.needs_input_grad
        weight, d_out, d_in, permutation_out, permutation_in = ctx.saved_tensors
        gradients = _gradients(grad, weight, d_out, d_in, permutation_out, permutation_in, need_out, need_in)
        return None, *gradients, None, None


def fold(
    weight: Tensor,
    d_out: Tensor,
    d_in: Tensor,
    permutation_out: Tensor | None = None,
    permutation_in: Tensor | None = None,
) -> Tensor:
    """Fold both rotations into a frozen weight: ``W_eff[permutation_out][:, permutation_in] = R_out^T W R_in^T``.

    Differentiable in the displacements only: the weight is frozen by definition. The gradient of the result is a
    transient of the backward pass, contracted to diagonal blocks at once. Autocast does not reach inside.

    Args:
        weight: Frozen weight ``(out, in)`` in the permuted frame.
        d_out: Output displacements ``(n, b, b)`` with ``n * b <= out``; ``n = 0`` means no rotation.
        d_in: Input displacements ``(m, c, c)`` with ``m * c <= in``; ``m = 0`` means no rotation.
        permutation_out: Permutation ``(out,)`` of the output side, int64, or of groups, ``(out / g,)``
            (:mod:`permutations`); or None.
        permutation_in: Permutation of the input side likewise.

    Returns:
        The effective weight ``(out, in)`` in the natural frame, in the dtype of ``weight``.

    Raises:
        ValueError: If dtypes or devices differ, the blocks are not square or do not fit the weight, or a permutation
            has another length or dtype; with ``ORTHOTRAIN_DEBUG=1`` also if it is no permutation.
    """
    for side, displacement, width in (("output", d_out, weight.shape[0]), ("input", d_in, weight.shape[1])):
        check_blocks("fold", f"{side} displacement", displacement, weight, "the weight", width)
    check_permutation("fold", "permutation_out", permutation_out, weight.shape[0], weight)
    check_permutation("fold", "permutation_in", permutation_in, weight.shape[1], weight)
    folded = _fold if traced(weight) else FoldFunction.apply
    return folded(weight, d_out, d_in, permutation_out, permutation_in)
