"""Working through a matrix a few rows at a time on the CPU, with permuted columns in buffers that stay in the cache.

A pass that materialises a permuted matrix writes it to memory and reads it back; above 32 MiB the C library also takes
fresh pages for it every time, and clearing those costs as much as a rotation (README.md, "Rows at a time").
"""

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_BYTES = 2**21
"""Bytes of a chunk: a few of them fit in the cache, and its products are large enough to be fast."""

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def chunk_rows(matrix: Tensor) -> int:
    """Return how many of the rows of ``(N, d)`` make a chunk, at least 1: all of them where launches are dear."""
    fitting = CHUNK_BYTES // max(1, matrix.shape[1] * matrix.element_size())
    return max(1, min(fitting, matrix.shape[0]) if matrix.device.type == "cpu" else matrix.shape[0])


def row_chunks(rows: int, step: int) -> Iterator[slice]:
    """Yield the ranges of ``step`` rows that make up ``rows``; the last may be shorter."""
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def gather_into(out: Tensor, x: Tensor, index: Tensor | None) -> Tensor:
    """Write ``x[:, index]`` into ``out`` and return it; ``x`` itself, contiguous, where ``index`` is None."""
    if index is None:
        return x.contiguous()
    torch.gather(_bits(x), 1, index.expand(x.shape[0], -1), out=_bits(out))
    return out


def scatter_into(out: Tensor, x: Tensor, index: Tensor) -> None:
    """Write ``out[:, index] = x``."""
    _bits(out).scatter_(1, index.expand(x.shape[0], -1), _bits(x))


def _bits(x: Tensor) -> Tensor:
    # measured: moving 16-bit floats as integers is 2 to 4 times as fast
    return x.view(_BITS[x.element_size()])
