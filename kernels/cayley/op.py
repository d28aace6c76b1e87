"""The public ``cayley``."""

from torch import Tensor

from orthotrain.kernels.chain.program import FUSED
from orthotrain.kernels.checks import check_square
from orthotrain.kernels.operation import operation


def _unsupported(skew: Tensor) -> str | None:
    size = skew.shape[-1]
    return f"its kernel takes blocks of up to {FUSED} rows, not {size}" if size > FUSED else None


_cayley = operation("cayley", ["skew"], saved=["output"], unsupported=_unsupported)


def cayley(skew: Tensor) -> Tensor:
    """Return the displacement of the Cayley rotation, D = 2Q (I - Q)^-1 = (I + Q)(I - Q)^-1 - I.

    Q = 0 gives exactly zero, and a small Q loses no digits: the identity is never subtracted from a rotation.
    Autocast does not act inside: half-precision inputs are computed in fp32 and rounded once. Only D is saved for
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
