"""The public ``skew`` and its custom operator ``orthotrain::skew``."""

import torch
from torch import Tensor

from orthotrain.kernels.checks import check_floating
from orthotrain.kernels.dispatch import implementation
from orthotrain.kernels.guard import guarded


@torch.library.custom_op("orthotrain::skew", mutates_args=())
def _skew(generators: Tensor, block_size: int) -> Tensor:
    with guarded(generators):
        return implementation(generators, "skew").skew_forward(generators, block_size)


@torch.library.custom_op("orthotrain::skew_backward", mutates_args=())
def _skew_backward(grad: Tensor) -> Tensor:
    with guarded(grad):
        return implementation(grad, "skew").skew_backward(grad)


@_skew.register_fake
def _(generators: Tensor, block_size: int) -> Tensor:
    return generators.new_empty(generators.shape[0], block_size, block_size)


@_skew_backward.register_fake
def _(grad: Tensor) -> Tensor:
    blocks, block_size, _ = grad.shape
    return grad.new_empty(blocks, block_size * (block_size - 1) // 2)


def _gradient(ctx, grad: Tensor) -> tuple[Tensor, None]:
    return _skew_backward(grad), None


_skew.register_autograd(_gradient)


def skew(generators: Tensor, block_size: int) -> Tensor:
    """Arrange generators as skew-symmetric blocks.

    Args:
        generators: Shape ``(n, block_size * (block_size - 1) // 2)``, any floating dtype; a row holds the strict
            upper triangle of one block, row-major.
        block_size: Rows and columns of one block.

    Returns:
        Q of shape ``(n, block_size, block_size)`` in the dtype of the generators, with Q^T = -Q exactly.

    Raises:
        ValueError: The generators are not a matrix of that width, or not of a floating dtype.
    """
    check_generators(generators, block_size)
    return _skew(generators, block_size)


def check_generators(generators: Tensor, block_size: int) -> None:
    """Refuse generators that are not a floating-point matrix of ``b(b-1)/2`` columns.

    Raises:
        ValueError: Naming both sizes, or the dtype.
    """
    check_floating("skew", "generators", generators)
    width = block_size * (block_size - 1) // 2
    if generators.ndim != 2 or generators.shape[1] != width:
        raise ValueError(
            f"generators of shape {tuple(generators.shape)} do not fit block_size={block_size}: "
            f"a block of that size has {width} generators, so the shape must be (n, {width})"
        )
