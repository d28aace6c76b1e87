"""Exponential displacement by Triton kernels: the scaling and squaring of README.md as chains of products.

The inputs are read with the scale factor, so the chains start from X = 2Q / 2^s and, being linear in it, from the
gradient scaled alike.
"""

import functools
import math

import torch
from torch import Tensor

from orthotrain.kernels.chain.launch import run_chain
from orthotrain.kernels.chain.program import FIRST, SECOND, Chain, ChainBuilder
from orthotrain.kernels.exponential.cpu import squarings

COUNT = squarings(torch.float32)


def _combination(powers: tuple[int, int, int], first: int) -> list[tuple[int, float]]:
    """Return the terms X/first! + X^2/(first+1)! + X^3/(first+2)!."""
    return [(power, 1 / math.factorial(first + number)) for number, power in enumerate(powers)]


@functools.cache
def forward_chain() -> Chain:
    """Return the Taylor polynomial by powers of X^3 and its squarings, seven products."""
    chain, x = ChainBuilder(inputs=1), FIRST
    square = chain.step((x, x))
    cube = chain.step((square, x))
    powers = (x, square, cube)
    value = chain.step(terms=_combination(powers, 7))
    for first in (4, 1):
        value = chain.step((cube, value), terms=_combination(powers, first))
    for _ in range(COUNT):
        value = chain.step((value, value), terms=[(value, 2)])
    return chain.build(scale=2.0 ** (1 - COUNT))


@functools.cache
def backward_chain() -> Chain:
    """Return the tangent of the forward chain, for Q^T and dL/dD as inputs, twenty products."""
    chain, x, dx = ChainBuilder(inputs=2), FIRST, SECOND
    square, dsquare = chain.step((x, x)), chain.step((x, dx), (dx, x))
    cube, dcube = chain.step((square, x)), chain.step((dsquare, x), (square, dx))
    powers, tangents = (x, square, cube), (dx, dsquare, dcube)
    value, tangent = chain.step(terms=_combination(powers, 7)), chain.step(terms=_combination(tangents, 7))
    for first in (4, 1):
        tangent = chain.step((dcube, value), (cube, tangent), terms=_combination(tangents, first))
        value = chain.step((cube, value), terms=_combination(powers, first))
    for step in range(COUNT):
        tangent = chain.step((value, tangent), (tangent, value), terms=[(tangent, 2)])
        if step < COUNT - 1:
            value = chain.step((value, value), terms=[(value, 2)])
    return chain.build(scale=2.0 ** (1 - COUNT))


def exponential_forward(skew: Tensor) -> Tensor:
    """Return D = exp(2Q) - I, shape ``(n, b, b)``, from Q of the same shape and dtype."""
    return run_chain(forward_chain(), skew)


def exponential_backward(grad: Tensor, skew: Tensor) -> Tensor:
    """Return dL/dQ from Q and dL/dD, all of shape ``(n, b, b)``."""
    return run_chain(backward_chain(), skew, grad)
