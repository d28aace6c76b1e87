"""The public ``skew``."""

from torch import Tensor

from orthotrain.kernels.checks import check_generators
from orthotrain.kernels.operation import operation


def _fake(generators: Tensor, block_size: int) -> Tensor:
    return generators.new_empty(generators.shape[0], block_size, block_size)


def _fake_backward(grad: Tensor) -> Tensor:
    blocks, block_size, _ = grad.shape
    return grad.new_empty(blocks, block_size * (block_size - 1) // 2)


_skew = operation("skew", ["generators"], fake=_fake, saved=[], fake_backward=_fake_backward)


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
    check_generators("skew", generators, block_size)
    return _skew(generators, block_size)
