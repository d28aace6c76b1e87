"""The definition of ``exponential``."""

from torch import Tensor

TERMS = 40
"""Terms of the series: for ||2Q|| up to 6 the remainder is below 1e-17."""


def exponential(skew: Tensor) -> Tensor:
    """Return ``D = exp(2Q) - I`` of ``Q (n, b, b)`` by the series ``2Q + (2Q)^2 / 2! + ...``."""
    terms = [2 * skew]
    while len(terms) < TERMS:
        terms.append(terms[-1] @ (2 * skew) / (len(terms) + 1))
    return sum(reversed(terms[:-1]), terms[-1])
