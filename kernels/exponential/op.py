"""The public ``exponential``."""

from torch import Tensor

from orthotrain.kernels.checks import check_square
from orthotrain.kernels.operation import operation

_exponential = operation("exponential", ["skew"])


def exponential(skew: Tensor) -> Tensor:
    """Return the displacement of the exponential rotation, D = exp(2Q) - I.

    The result is exact to the working precision for ||Q||_2 <= 3; beyond that the error grows as ``squarings`` states.
    Q = 0 gives exactly zero, and a small Q loses no digits. Autocast does not act inside: half-precision inputs are
    computed in fp32 and rounded once. Only Q is saved for backward.

    Args:
        skew: Q of shape ``(n, b, b)``, skew-symmetric blocks; n may be 0.

    Returns:
        D of shape ``(n, b, b)`` in the dtype of ``skew``.

    Raises:
        ValueError: Q is not a batch of square blocks, or not of a floating dtype.
    """
    check_square("exponential", "skew", skew)
    return _exponential(skew)
