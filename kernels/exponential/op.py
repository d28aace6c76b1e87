"""The public ``exponential`` and its custom operator ``orthotrain::exponential``."""

import torch
from torch import Tensor

from orthotrain.kernels.checks import check_square
from orthotrain.kernels.dispatch import implementation
from orthotrain.kernels.guard import guarded


@torch.library.custom_op("orthotrain::exponential", mutates_args=())
def _exponential(skew: Tensor) -> Tensor:
    with guarded(skew):
        return implementation(skew, "exponential").exponential_forward(skew)


@torch.library.custom_op("orthotrain::exponential_backward", mutates_args=())
def _exponential_backward(skew: Tensor, grad: Tensor) -> Tensor:
    with guarded(skew):
        return implementation(skew, "exponential").exponential_backward(skew, grad)


@_exponential.register_fake
def _(skew: Tensor) -> Tensor:
    return skew.new_empty(skew.shape)


@_exponential_backward.register_fake
def _(skew: Tensor, grad: Tensor) -> Tensor:
    return skew.new_empty(skew.shape)


def _save(ctx, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _gradient(ctx, grad: Tensor) -> Tensor:
    (skew,) = ctx.saved_tensors
    return _exponential_backward(skew, grad)


_exponential.register_autograd(_gradient, setup_context=_save)


def exponential(skew: Tensor) -> Tensor:
    """Displacement of the exponential rotation, D = exp(2Q) - I.

    Exact to the working precision for ||Q||_2 <= 3; beyond that the error grows as ``squarings`` states. Q = 0 gives
    exactly zero, and a small Q loses no digits. Autocast does not reach inside: half-precision inputs are computed in
    fp32 and rounded once. Only Q is saved for backward.

    Args:
        skew: Q of shape ``(n, b, b)``, skew-symmetric blocks; n may be 0.

    Returns:
        D of shape ``(n, b, b)`` in the dtype of ``skew``.

    Raises:
        ValueError: Q is not a batch of square blocks, or not of a floating dtype.
    """
    check_square("exponential", "skew", skew)
    return _exponential(skew)
