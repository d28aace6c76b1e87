"""``orthotrain::fold`` as a torch custom op; its backward contracts the weight gradient to blocks and drops it."""

from typing import Any

import torch
from torch import Tensor

from orthotrain.kernels.fold import reference


@torch.library.custom_op("orthotrain::fold", mutates_args=())
def _fold(weight: Tensor, d_out: Tensor, d_in: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    return reference.fold_forward(weight.contiguous(), d_out, d_in, rows, columns)


@_fold.register_fake
def _(weight: Tensor, d_out: Tensor, d_in: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    return weight.new_empty(weight.shape)


@torch.library.custom_op("orthotrain::fold_backward", mutates_args=())
def _fold_backward(
    grad: Tensor, weight: Tensor, d_out: Tensor, d_in: Tensor, rows: Tensor | None, columns: Tensor | None
) -> tuple[Tensor, Tensor]:
    return reference.fold_backward(grad, weight.contiguous(), d_out, d_in, rows, columns)


@_fold_backward.register_fake
def _(
    grad: Tensor, weight: Tensor, d_out: Tensor, d_in: Tensor, rows: Tensor | None, columns: Tensor | None
) -> tuple[Tensor, Tensor]:
    return d_out.new_empty(d_out.shape), d_in.new_empty(d_in.shape)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor, None, None]:
    grad_out, grad_in = _fold_backward(grad, *ctx.saved_tensors)
    return None, grad_out, grad_in, None, None


_fold.register_autograd(_backward, setup_context=_setup_context)


def fold(
    weight: Tensor, d_out: Tensor, d_in: Tensor, rows: Tensor | None = None, columns: Tensor | None = None
) -> Tensor:
    """Fold both rotations into a frozen weight: ``W_eff[rows][:, columns] = R_out^T W R_in^T``.

    Differentiable in the displacements only: the weight is frozen by definition. The gradient of the result is a
    transient of the backward pass, contracted to diagonal blocks at once.

    Args:
        weight: Frozen weight ``(out, in)`` in the permuted frame.
        d_out: Output displacements ``(n, b, b)`` with ``n * b <= out``; ``n = 0`` means no rotation.
        d_in: Input displacements ``(m, c, c)`` with ``m * c <= in``; ``m = 0`` means no rotation.
        rows: Permutation ``(out,)`` of the output side, int64, or None.
        columns: Permutation ``(in,)`` of the input side, int64, or None.

    Returns:
        The effective weight ``(out, in)`` in the natural frame, in the dtype of ``weight``.

    Raises:
        ValueError: If dtypes differ or the blocks do not fit the weight.
    """
    for side, displacement, width in (("output", d_out, weight.shape[0]), ("input", d_in, weight.shape[1])):
        if displacement.dtype != weight.dtype:
            raise ValueError(f"fold: {side} displacement is {displacement.dtype} and the weight is {weight.dtype}")
        if displacement.shape[0] * displacement.shape[-1] > width:
            raise ValueError(f"fold: {side} displacement {tuple(displacement.shape)} does not fit in width {width}")
    return _fold(weight, d_out, d_in, rows, columns)
