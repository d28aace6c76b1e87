"""Cayley-Neumann displacement in plain PyTorch; README.md derives the recurrence and its gradient.

With D_k the displacement of order k, D_k = 2(Q + Q^2) + Q^2 D_(k-2), from D_0 = Q or D_1 = 2Q + Q^2. No identity
matrix is ever added, so zero generators give exactly zero and a small Q loses no digits.
"""

import torch
from torch import Tensor

from orthotrain.kernels.parts import in_parts
from orthotrain.kernels.skew.reference import skew_backward, skew_forward


def cayley_neumann_forward(skew: Tensor, order: int) -> Tensor:
    """Return D = 2Q + ... + 2Q^order + Q^(order+1), shape ``(n, b, b)``, from Q of the same shape and dtype."""

    def part(skew: Tensor) -> Tensor:
        return _series(skew.to(torch.promote_types(skew.dtype, torch.float32)), order).to(skew.dtype)

    # order 1 is a sum, which would keep the strides of a transposed Q
    return in_parts(part, skew, block_size=skew.shape[-1]).contiguous()


def cayley_neumann_backward(skew: Tensor, grad: Tensor, order: int) -> Tensor:
    """Return dL/dQ from Q and dL/dD, all of shape ``(n, b, b)``.

    D is a real polynomial in Q, so the adjoint of its derivative at Q is its derivative at Q^T: the recurrence is
    run once more at Q^T together with its tangent in the direction dL/dD. Nothing of the forward is needed but Q.
    """
    dtype = torch.promote_types(skew.dtype, torch.float32)

    def part(skew: Tensor, grad: Tensor) -> Tensor:
        return _tangent(skew.to(dtype).mT, grad.to(dtype), order).to(skew.dtype)

    return in_parts(part, skew, grad, block_size=skew.shape[-1]).contiguous()


def cayley_neumann_generators_forward(generators: Tensor, block_size: int, order: int) -> Tensor:
    """Return D, shape ``(n, b, b)``, from generators of shape ``(n, b(b-1)/2)``."""
    dtype = torch.promote_types(generators.dtype, torch.float32)

    def part(generators: Tensor) -> Tensor:
        return _series(skew_forward(generators, block_size).to(dtype), order).to(generators.dtype)

    return in_parts(part, generators, block_size=block_size)


def cayley_neumann_generators_backward(generators: Tensor, grad: Tensor, order: int) -> Tensor:
    """Return dL/dgenerators, shape ``(n, b(b-1)/2)``, from the generators and dL/dD, shape ``(n, b, b)``."""
    block_size = grad.shape[-1]
    dtype = torch.promote_types(generators.dtype, torch.float32)

    def part(generators: Tensor, grad: Tensor) -> Tensor:
        # the transpose of a skew Q is -Q, whose rows are contiguous
        transposed = skew_forward(-generators, block_size).to(dtype)
        return skew_backward(_tangent(transposed, grad.to(dtype), order).to(generators.dtype))

    return in_parts(part, generators, grad, block_size=block_size)


def _series(q: Tensor, order: int) -> Tensor:
    square = torch.bmm(q, q)
    base = (q + square).mul_(2)
    value = 2 * q + square if order % 2 else q
    for _ in range(order // 2):
        value = torch.baddbmm(base, square, value)
    return value


def _tangent(q: Tensor, tangent: Tensor, order: int) -> Tensor:
    """Return the derivative of :func:`_series` at ``q`` in the direction ``tangent``."""
    square = torch.bmm(q, q)
    square_tangent = torch.bmm(q, tangent).baddbmm_(tangent, q)
    base, base_tangent = (q + square).mul_(2), (tangent + square_tangent).mul_(2)
    value, value_tangent = (2 * q + square, 2 * tangent + square_tangent) if order % 2 else (q, tangent)
    steps = order // 2
    for step in range(steps):
        value_tangent = torch.baddbmm(base_tangent, square, value_tangent).baddbmm_(square_tangent, value)
        if step < steps - 1:
            value = torch.baddbmm(base, square, value)
    return value_tangent
