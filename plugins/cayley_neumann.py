"""The Cayley-Neumann series, the default parameterization."""

import torch
from torch import Tensor

from orthotrain.kernels.cayley_neumann import cayley_neumann
from orthotrain.plugins.base import Parameterization
from orthotrain.plugins.registry import register


@register("cayley_neumann")
class CayleyNeumann(Parameterization):
    """Cayley transform with the inverse as a Neumann series: only products, nearly orthogonal at small norms.

    R = (I + Q)(I + Q + ... + Q^k), so D = 2Q + 2Q^2 + ... + 2Q^k + Q^(k+1), for order k. It converges for
    ||Q||_2 < 1. Since R = (I + Q)(I - Q)^-1 (I - Q^(k+1)), the defect is R^T R = (I - Q^(k+1))(I - (-Q)^(k+1)):

    - even k: I - Q^(2k+2), with eigenvalues 1 + theta^(2k+2);
    - odd k: (I - Q^(k+1))^2, with eigenvalues (1 - (-1)^((k+1)/2) theta^(k+1))^2.

    An even order is therefore worth far more than the odd one above it: at ||Q||_2 = 0.1 the defect of order 4 is
    1e-10, that of order 5 2e-6. Hence the default of 4.

    The singular values of R are the roots of these eigenvalues: sqrt(1 + theta^(2k+2)) for even k, and
    ``|1 - (-1)^((k+1)/2) theta^(k+1)|`` for odd k. They are all within an error e of 1 if and only if

    - even k: ||Q||_2 <= ((1 + e)^2 - 1)^(1/(2k+2));
    - odd k: ||Q||_2 <= e^(1/(k+1)).

    For order 4 the singular values are within 1e-3 of 1 up to ||Q||_2 = 0.537, an angle of 56 degrees.

    Source: POET's CNP (arXiv:2506.08001), there with k = 3. PEFT's OFT has the same sign; its
    ``num_cayley_neumann_terms`` is k + 2.

    Args:
        order: Highest power k of the Neumann series, an integer of at least 1.

    Raises:
        ValueError: The order is not such an integer.
    """

    def __init__(self, order: int = 4) -> None:
        if not isinstance(order, int) or isinstance(order, bool) or order < 1:
            raise ValueError(f"CayleyNeumann: order must be an integer of at least 1, got {order!r}")
        self.order = order

    def displacement(self, generators: Tensor, block_size: int) -> Tensor:
        """Return D = 2Q + ... + 2Q^k + Q^(k+1), shape ``(n, b, b)``; see the base class."""
        return cayley_neumann(generators, block_size, self.order)

    def largest_norm(self, error: float) -> float:
        """Return the largest ``||Q||_2`` at which the singular values of R are within ``error`` of 1, for its order."""
        if self.order % 2:
            return error ** (1 / (self.order + 1))
        return ((1 + error) ** 2 - 1) ** (1 / (2 * self.order + 2))

    def rounded_displacement(self, generators: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
        """Return D, shape ``(n, b, b)`` in ``dtype``; its higher powers are rounded too (kernels/cayley_neumann)."""
        return cayley_neumann(generators, block_size, self.order, dtype)
