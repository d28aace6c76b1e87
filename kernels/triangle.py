"""Triton helpers: where a pair i < j lies among the generators of a block."""

import triton
from triton import language as tl


@triton.jit
def upper_index(i, j, size: tl.constexpr):
    """Return the place of entry (i, j), i < j, in the strict upper triangle of a ``size x size`` block, row-major."""
    return i * (2 * size - i - 1) // 2 + (j - i - 1)
