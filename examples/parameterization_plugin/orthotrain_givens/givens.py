"""A palindrome of Givens rotations."""

import torch
from torch import Tensor

from orthotrain.kernels.skew import skew
from orthotrain.plugins import Parameterization
from orthotrain_givens.operator import palindrome


class Givens(Parameterization):
    """Palindrome of Givens rotations: sines and cosines only, orthogonal at every norm.

    R = G_1 G_2 ... G_m G_m ... G_2 G_1, where G_k turns disjoint planes (i, j) by the angles q_ij, and the rounds
    1 .. m go through all planes once. Every plane is turned twice, so that D = 2Q + 2Q^2 + O(Q^3), and opposite
    generators give the transpose. Computed in fp64 and rounded once: in fp32 the rounding of
    hundreds of rounds would add up.

    Source: Strang, SIAM J. Numer. Anal. 5 (1968), the symmetric splitting of an exponential.
    """

    def displacement(self, generators: Tensor, block_size: int) -> Tensor:
        """Return D, shape ``(n, b, b)``; see the base class."""
        return palindrome(skew(generators.to(torch.float64), block_size)).to(generators.dtype)
