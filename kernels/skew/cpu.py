"""Skew-symmetric blocks in PyTorch for the CPU: the strict upper triangle, row by row, and its negative below.

The index vectors depend only on the block size, so they are built once for each block size and device. Both directions
gather: reading from scattered positions is two to five times faster on a CPU than writing to them (README.md).
"""

import functools
import math

import torch
from torch import Tensor

from orthotrain.kernels.dispatch import traced


@functools.lru_cache(maxsize=64)
def _triangles(block_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the flat positions of the strict upper triangle, row-major, and of their mirror images."""
    rows, columns = torch.triu_indices(block_size, block_size, offset=1, device=device)
    return rows * block_size + columns, columns * block_size + rows


@functools.lru_cache(maxsize=64)
def _sources(block_size: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return for each entry of a block its generator, and its factor: 1 above the diagonal, -1 below, 0 on it."""
    upper, lower = _triangles.__wrapped__(block_size, device)
    generators = torch.arange(upper.numel(), device=device)
    source = torch.zeros(block_size * block_size, dtype=torch.int64, device=device)
    factor = torch.zeros(block_size * block_size, dtype=dtype, device=device)
    for positions, sign in ((upper, 1), (lower, -1)):
        source[positions], factor[positions] = generators, sign
    return source, factor


def skew_forward(generators: Tensor, block_size: int) -> Tensor:
    """Return Q, shape ``(n, block_size, block_size)``, from generators of shape ``(n, b(b-1)/2)``; Q^T = -Q exactly."""
    shape = (generators.shape[0], block_size, block_size)
    if block_size < 2:  # a block of one has no generator to read
        return generators.new_zeros(shape)
    # vectors made while tracing hold no values, so they must not be cached
    sources = _sources.__wrapped__ if traced(generators) else _sources
    source, factor = sources(block_size, generators.device, generators.dtype)
    return generators.index_select(1, source).mul_(factor).view(shape)


def skew_backward(grad: Tensor) -> Tensor:
    """Return dL/dgenerators, shape ``(n, b(b-1)/2)``, from dL/dQ, shape ``(n, b, b)``: upper minus mirrored lower."""
    blocks, block_size, _ = grad.shape
    triangles = _triangles.__wrapped__ if traced(grad) else _triangles
    upper, lower = triangles(block_size, grad.device)
    flat = grad.reshape(blocks, block_size * block_size)
    return flat.index_select(1, upper) - flat.index_select(1, lower)


def block_size_of(generators: int) -> int | None:
    """Return b with ``b(b-1)/2 = generators`` and b at least 2, None if there is none."""
    size = (1 + math.isqrt(1 + 8 * generators)) // 2
    return size if size >= 2 and size * (size - 1) // 2 == generators else None
