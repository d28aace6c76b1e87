"""The public ``cayley`` and its custom operator ``orthotrain::cayley``."""

import torch
from torch import Tensor

from orthotrain.kernels.chain.program import FUSED
from orthotrain.kernels.checks import check_square
from orthotrain.kernels.dispatch import implementation
from orthotrain.kernels.guard import guarded


@torch.library.custom_op("orthotrain::cayley", mutates_args=())
def _cayley(skew: Tensor) -> Tensor:
    with guarded(skew):
        size = skew.shape[-1]
        unsupported = f"its kernel takes blocks of up to {FUSED} rows, not {size}" if size > FUSED else None
        return implementation(skew, "cayley", unsupported).cayley_forward(skew)


@torch.library.custom_op("orthotrain::cayley_backward", mutates_args=())
def _cayley_backward(displacement: Tensor, grad: Tensor) -> Tensor:
    with guarded(displacement):
        return implementation(displacement, "cayley").cayley_backward(displacement, grad)


@_cayley.register_fake
def _(skew: Tensor) -> Tensor:
    return skew.new_empty(skew.shape)


@_cayley_backward.register_fake
def _(displacement: Tensor, grad: Tensor) -> Tensor:
    return displacement.new_empty(displacement.shape)


def _save(ctx, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(output)


def _gradient(ctx, grad: Tensor) -> Tensor:
    (displacement,) = ctx.saved_tensors
    return _cayley_backward(displacement, grad)


_cayley.register_autograd(_gradient, setup_context=_save)


def cayley(skew: Tensor) -> Tensor:
    """Displacement of the Cayley rotation, D = 2Q (I - Q)^-1 = (I + Q)(I - Q)^-1 - I.

    Q = 0 gives exactly zero, and a small Q loses no digits: the identity is never subtracted from a rotation.
    Autocast does not reach inside: half-precision inputs are computed in fp32 and rounded once. Only D is saved for
    backward.

    Args:
        skew: Q of shape ``(n, b, b)``, skew-symmetric blocks; n may be 0.

    Returns:
        D of shape ``(n, b, b)`` in the dtype of ``skew``.

    Raises:
        ValueError: Q is not a batch of square blocks, or not of a floating dtype.
    """
    check_square("cayley", "skew", skew)
    return _cayley(skew)
