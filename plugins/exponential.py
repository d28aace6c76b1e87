"""The matrix exponential."""

import math

import torch
from torch import Tensor

from orthotrain.kernels.exponential import DEGREE, exponential, squarings
from orthotrain.kernels.skew import skew
from orthotrain.plugins.base import Parameterization
from orthotrain.plugins.registry import register


@register("exponential")
class Exponential(Parameterization):
    """Matrix exponential: products only, orthogonal to the working precision for ||Q||_2 up to 3.

    R = exp(2Q), so D = exp(2Q) - I. An eigenvalue i theta of Q becomes exp(2 i theta), a rotation by 2 theta: every
    rotation is reached, already with ||Q||_2 <= pi/2. D is computed by scaling and squaring a Taylor polynomial T:
    R = T(X)^m with X = 2Q/m, so R^T R = (T(X) T(-X))^m, where m is a fixed power of two.

    Source: the exponential map of SO(n) as a parameterization, Lezcano-Casado and Martinez-Rubio,
    arXiv:1901.08428; scaling and squaring, Higham, SIAM J. Matrix Anal. Appl. 26 (2005).
    """

    def displacement(self, generators: Tensor, block_size: int) -> Tensor:
        """Return D = exp(2Q) - I, shape ``(n, b, b)``; see the base class."""
        return exponential(skew(generators, block_size))

    def orthogonality_error(self, norm: float) -> float:
        """Return (1 + d)^m - 1 with d the bound of |T(ix) T(-ix) - 1| over the scaled angles x <= 2 norm / m.

        This is for fp32, where m = 8; fp64 has m = 64 and errs less. The bound is sharp at small norms, and within an
        order of magnitude for norms from 3 to 10.
        """
        steps = squarings(torch.float32)
        angle = 2 * norm / 2**steps
        defect = sum(coefficient * angle**power for power, coefficient in _TAYLOR_DEFECT.items())
        log_error = 2**steps * math.log1p(defect)
        return math.expm1(log_error) if log_error < 700 else math.inf


def _taylor_defect() -> dict[int, float]:
    """Return the absolute coefficients by power of T(x) T(-x) - 1; those up to the degree of T cancel exactly."""
    return {
        power: abs(
            sum((-1) ** i / (math.factorial(i) * math.factorial(power - i)) for i in range(power - DEGREE, DEGREE + 1))
        )
        for power in range(DEGREE + 1, 2 * DEGREE + 1, 2)
    }


_TAYLOR_DEFECT = _taylor_defect()
