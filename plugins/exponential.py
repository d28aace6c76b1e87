"""The matrix exponential."""

from torch import Tensor

from orthotrain.kernels.exponential import exponential
from orthotrain.kernels.skew import skew
from orthotrain.plugins.base import Parameterization
from orthotrain.plugins.registry import register


@register("exponential")
class Exponential(Parameterization):
    """Matrix exponential: only products, orthogonal to the working precision for ||Q||_2 up to 3.

    R = exp(2Q), so D = exp(2Q) - I. An eigenvalue i theta of Q becomes exp(2 i theta), a rotation by 2 theta: every
    rotation is reached with some ||Q||_2 <= pi/2. D is computed by scaling and squaring a Taylor polynomial T:
    R = T(X)^m with X = 2Q/m, so R^T R = (T(X) T(-X))^m, where m is a fixed power of two.

    Source: the exponential map of SO(n) as a parameterization, Lezcano-Casado and Martinez-Rubio,
    arXiv:1901.08428; scaling and squaring, Higham, SIAM J. Matrix Anal. Appl. 26 (2005).
    """

    def displacement(self, generators: Tensor, block_size: int) -> Tensor:
        """Return D = exp(2Q) - I, shape ``(n, b, b)``; see the base class."""
        return exponential(skew(generators, block_size))

    def largest_norm(self, error: float) -> float:
        """Return 3, up to which R is orthogonal to the working precision, whatever the ``error``."""
        return 3.0
