"""Exponential displacement in PyTorch for the CPU: scaling and squaring on exp(X) - I; README.md derives it.

The number of squarings is fixed by the precision, never by the values: no norm is computed, so no device sync.
"""

import math

import torch
from torch import Tensor

from orthotrain.kernels.block_batches import in_parts

DEGREE = 9
"""Degree of the Taylor polynomial: the highest that four products reach with this scheme."""


def squarings(dtype: torch.dtype) -> int:
    """Return how often the Taylor part is squared when computing in ``dtype``: 6 in fp64, else 3.

    The truncation error of D, relative to ||2Q||, is (2||Q|| / 2^squarings)^9 / 10!: below the machine epsilon of
    fp64 and of fp32 respectively for every ||Q||_2 <= 3. (||Q||_2 <= pi/2 already reaches every rotation.)
    """
    return 6 if dtype == torch.float64 else 3


def _combine(powers: tuple[Tensor, Tensor, Tensor], first: int) -> Tensor:
    """Return X/first! + X^2/(first+1)! + X^3/(first+2)!."""
    total = powers[0] / math.factorial(first)
    total.add_(powers[1], alpha=1 / math.factorial(first + 1))
    return total.add_(powers[2], alpha=1 / math.factorial(first + 2))


def exponential_forward(skew: Tensor) -> Tensor:
    """Return D = exp(2Q) - I, shape ``(n, b, b)``, from Q of the same shape and dtype."""
    return in_parts(_value, skew, block_size=skew.shape[-1])


def exponential_backward(grad: Tensor, skew: Tensor) -> Tensor:
    """Return dL/dQ from Q and dL/dD, all of shape ``(n, b, b)``.

    The forward computes a real polynomial in Q, so the adjoint of its derivative at Q is its derivative at
    Q^T: the same steps run once more at Q^T together with their tangents. Nothing but Q is needed, and no chain of
    intermediate squares is kept.
    """
    return in_parts(_adjoint, skew, grad, block_size=skew.shape[-1])


def _value(skew: Tensor) -> Tensor:
    q = skew.to(torch.promote_types(skew.dtype, torch.float32))
    count = squarings(q.dtype)
    x = q * 2.0 ** (1 - count)
    square = torch.bmm(x, x)
    cube = torch.bmm(square, x)
    powers = (x, square, cube)
    value = _combine(powers, 7)
    for first in (4, 1):
        value = _combine(powers, first).baddbmm_(cube, value)
    for _ in range(count):
        value = torch.baddbmm(value, value, value, beta=2)
    return value.to(skew.dtype)


def _adjoint(skew: Tensor, grad: Tensor) -> Tensor:
    dtype = torch.promote_types(skew.dtype, torch.float32)
    count = squarings(dtype)
    x, dx = skew.to(dtype).mT * 2.0 ** (1 - count), grad.to(dtype) * 2.0 ** (1 - count)
    square, dsquare = torch.bmm(x, x), torch.bmm(x, dx).baddbmm_(dx, x)
    cube, dcube = torch.bmm(square, x), torch.bmm(dsquare, x).baddbmm_(square, dx)
    powers, tangents = (x, square, cube), (dx, dsquare, dcube)
    value, tangent = _combine(powers, 7), _combine(tangents, 7)
    for first in (4, 1):
        tangent = _combine(tangents, first).baddbmm_(dcube, value).baddbmm_(cube, tangent)
        value = _combine(powers, first).baddbmm_(cube, value)
    for step in range(count):
        tangent = torch.baddbmm(tangent, value, tangent, beta=2).baddbmm_(tangent, value)
        if step < count - 1:
            value = torch.baddbmm(value, value, value, beta=2)
    return tangent.to(skew.dtype)
