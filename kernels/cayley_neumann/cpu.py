"""Cayley-Neumann displacement in PyTorch for the CPU; README.md derives the recurrence and its gradient.

With D_k the displacement of order k, D_k = 2(Q + Q^2) + Q^2 D_(k-2), from D_0 = Q or D_1 = 2Q + Q^2. No identity
matrix is ever added, so zero generators give exactly zero and a small Q loses no digits.
"""

import torch
from torch import Tensor

from orthotrain.kernels.block_batches import in_parts
from orthotrain.kernels.skew.cpu import skew_backward, skew_forward

ROUNDED_FROM = 128
"""Smallest block whose products are faster in bf16: measured on an Intel Xeon with AMX, 1 thread."""

ROUNDED_PART_BYTES = 2**20
"""Bytes of a part with products in bf16, which are short beside the calls: a quarter faster than 2**18 there."""


def cayley_neumann_forward(generators: Tensor, block_size: int, order: int, dtype: torch.dtype) -> Tensor:
    """Return D, shape ``(n, b, b)`` in ``dtype``, from generators of shape ``(n, b(b-1)/2)``."""
    wide = torch.promote_types(generators.dtype, torch.float32)
    rounded = _rounds_products(generators, block_size, dtype)
    series = _rounded_series if rounded else _series

    def part(generators: Tensor) -> Tensor:
        return series(skew_forward(generators, block_size).to(wide), order).to(dtype)

    return in_parts(part, generators, block_size=block_size, part_bytes=ROUNDED_PART_BYTES if rounded else None)


def cayley_neumann_backward(grad: Tensor, generators: Tensor, order: int) -> Tensor:
    """Return dL/dgenerators, shape ``(n, b(b-1)/2)``, from dL/dD, shape ``(n, b, b)``, and the generators.

    D is a real polynomial in Q, so the adjoint of its derivative at Q is its derivative at Q^T: the recurrence runs
    once more at Q^T, together with its tangent in the direction dL/dD. The forward has to keep nothing else.
    """
    block_size = grad.shape[-1]
    wide = torch.promote_types(generators.dtype, torch.float32)
    rounded = _rounds_products(generators, block_size, grad.dtype)
    derivative = _rounded_tangent if rounded else _tangent

    def part(generators: Tensor, grad: Tensor) -> Tensor:
        # Q^T = -Q, whose rows are contiguous
        transposed = skew_forward(-generators, block_size).to(wide)
        return skew_backward(derivative(transposed, grad.to(wide), order).to(generators.dtype))

    part_bytes = ROUNDED_PART_BYTES if rounded else None
    return in_parts(part, generators, grad, block_size=block_size, part_bytes=part_bytes)


def _rounds_products(generators: Tensor, block_size: int, dtype: torch.dtype) -> bool:
    """Tell whether a result in ``dtype`` is made of products in bf16, where they were measured to be faster."""
    if dtype != torch.bfloat16 or generators.dtype.itemsize < 4 or block_size < ROUNDED_FROM:
        return False
    return generators.device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _series(q: Tensor, order: int) -> Tensor:
    square, base, value = _before_last(q, order)
    return value if order == 1 else torch.baddbmm(base, square, value)


def _rounded_series(q: Tensor, order: int) -> Tensor:
    """Return :func:`_series` with all but the exact 2Q in bf16."""
    square, _, value = _before_last(q.bfloat16(), order)
    return torch.add(square if order == 1 else torch.baddbmm(square, square, value, beta=2), q, alpha=2)


def _before_last(q: Tensor, order: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``Q^2``, ``2(Q + Q^2)`` and the last value of the recurrence but one (for order 1 the only value)."""
    square = torch.bmm(q, q)
    base = (q + square).mul_(2)
    value = 2 * q + square if order % 2 else q
    for _ in range(order // 2 - 1):
        value = torch.baddbmm(base, square, value)
    return square, base, value


def _tangent(q: Tensor, tangent: Tensor, order: int) -> Tensor:
    """Return the derivative of :func:`_series` at ``q`` in the direction ``tangent``."""
    if order == 1:
        return 2 * tangent + _square_tangent(q, tangent)
    square, square_tangent, value, value_tangent, base_tangent = _tangents_before_last(q, tangent, order)
    return torch.baddbmm(base_tangent, square, value_tangent).baddbmm_(square_tangent, value)


def _rounded_tangent(q: Tensor, tangent: Tensor, order: int) -> Tensor:
    """Return :func:`_tangent` with all but the exact 2 ``tangent`` in bf16."""
    low, direction = q.bfloat16(), tangent.bfloat16()
    if order == 1:
        return torch.add(_square_tangent(low, direction), tangent, alpha=2)
    square, square_tangent, value, value_tangent, _ = _tangents_before_last(low, direction, order)
    higher = torch.baddbmm(square_tangent, square, value_tangent, beta=2).baddbmm_(square_tangent, value)
    return torch.add(higher, tangent, alpha=2)


def _square_tangent(q: Tensor, tangent: Tensor) -> Tensor:
    return torch.bmm(q, tangent).baddbmm_(tangent, q)


def _tangents_before_last(q: Tensor, tangent: Tensor, order: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return ``Q^2`` and its tangent, the last value but one and its tangent, and the tangent of ``2(Q + Q^2)``."""
    # an order without steps: the values that the recurrence starts from
    square, base, value = _before_last(q, 2 + order % 2)
    square_tangent = _square_tangent(q, tangent)
    base_tangent = (tangent + square_tangent).mul_(2)
    value_tangent = 2 * tangent + square_tangent if order % 2 else tangent
    for _ in range(order // 2 - 1):
        value_tangent = torch.baddbmm(base_tangent, square, value_tangent).baddbmm_(square_tangent, value)
        value = torch.baddbmm(base, square, value)
    return square, square_tangent, value, value_tangent, base_tangent
