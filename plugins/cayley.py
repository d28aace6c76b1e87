"""The exact Cayley transform."""

from torch import Tensor

from orthotrain.kernels.cayley import cayley
from orthotrain.kernels.skew import skew
from orthotrain.plugins.base import Parameterization
from orthotrain.plugins.registry import register


@register("cayley")
class Cayley(Parameterization):
    """Exact Cayley transform: orthogonal at every norm, for a linear solve per block.

    R = (I + Q)(I - Q)^-1, so D = 2Q (I - Q)^-1. An eigenvalue i theta of Q becomes (1 + i theta)/(1 - i theta), a
    rotation by 2 arctan(theta). The map reaches every rotation that has no eigenvalue -1. I + Q and (I - Q)^-1 commute,
    so R^T R = I at every norm.

    Source: the parameterization of OFT (arXiv:2306.07280) in the sign of POET (arXiv:2506.08001). PEFT's exact
    Cayley is the transpose of this one.
    """

    def displacement(self, generators: Tensor, block_size: int) -> Tensor:
        """Return D = 2Q (I - Q)^-1, shape ``(n, b, b)``; see the base class."""
        return cayley(skew(generators, block_size))
