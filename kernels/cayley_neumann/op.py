"""The public ``cayley_neumann`` and its custom operator ``orthotrain::cayley_neumann``."""

import torch
from torch import Tensor

from orthotrain.kernels.checks import check_square
from orthotrain.kernels.dispatch import implementation
from orthotrain.kernels.guard import guarded


@torch.library.custom_op("orthotrain::cayley_neumann", mutates_args=())
def _cayley_neumann(skew: Tensor, order: int) -> Tensor:
    with guarded(skew):
        return implementation(skew, "cayley_neumann").cayley_neumann_forward(skew, order)


@torch.library.custom_op("orthotrain::cayley_neumann_backward", mutates_args=())
def _cayley_neumann_backward(skew: Tensor, grad: Tensor, order: int) -> Tensor:
    with guarded(skew):
        return implementation(skew, "cayley_neumann").cayley_neumann_backward(skew, grad, order)


@_cayley_neumann.register_fake
def _(skew: Tensor, order: int) -> Tensor:
    return skew.new_empty(skew.shape)


@_cayley_neumann_backward.register_fake
def _(skew: Tensor, grad: Tensor, order: int) -> Tensor:
    return skew.new_empty(skew.shape)


def _save(ctx, inputs: tuple[Tensor, int], output: Tensor) -> None:
    skew, ctx.order = inputs
    ctx.save_for_backward(skew)


def _gradient(ctx, grad: Tensor) -> tuple[Tensor, None]:
    (skew,) = ctx.saved_tensors
    return _cayley_neumann_backward(skew, grad, ctx.order), None


_cayley_neumann.register_autograd(_gradient, setup_context=_save)


def cayley_neumann(skew: Tensor, order: int) -> Tensor:
    """Displacement of the Cayley-Neumann rotation, D = 2Q + 2Q^2 + ... + 2Q^order + Q^(order+1).

    This is (I + Q)(I + Q + ... + Q^order) - I (POET's CNP, arXiv:2506.08001). Autocast does not reach inside:
    half-precision inputs are computed in fp32 and rounded once. Only Q is saved for backward.

    Args:
        skew: Q of shape ``(n, b, b)``, skew-symmetric blocks; n may be 0.
        order: Highest power of the Neumann series, at least 1.

    Returns:
        D of shape ``(n, b, b)`` in the dtype of ``skew``.

    Raises:
        ValueError: Q is not a batch of square blocks, or not of a floating dtype, or the order is below 1.
    """
    check_square("cayley_neumann", "skew", skew)
    check_order(order)
    return _cayley_neumann(skew, order)


def check_order(order: int) -> None:
    """Refuse an order below 1.

    Raises:
        ValueError: Naming the order.
    """
    if order < 1:
        raise ValueError(f"order must be at least 1, got {order}")
