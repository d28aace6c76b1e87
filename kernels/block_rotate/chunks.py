"""Working through a matrix a few rows at a time on the CPU, with permuted columns in buffers that stay in the cache.

A pass that materialises a permuted matrix writes it to memory and reads it back; above 32 MiB the C library also takes
fresh pages for it every time, and clearing those costs as much as a rotation (README.md, "Rows at a time").
"""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from orthotrain.kernels.groups import group_of, spread

CHUNK_BYTES = 2**21
"""Bytes of a chunk: a few of them fit in the cache, and its products are large enough to be fast."""

_UNITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
"""What is moved in place of floats, by its bytes. Only copied, never computed with: all bits stay as they are."""


def chunk_rows(matrix: Tensor) -> int:
    """Return how many of the rows of ``(N, d)`` make a chunk, at least 1: all of them where launches are dear."""
    fitting = CHUNK_BYTES // max(1, matrix.shape[1] * matrix.element_size())
    return max(1, min(fitting, matrix.shape[0]) if matrix.device.type == "cpu" else matrix.shape[0])


def row_chunks(rows: int, step: int) -> Iterator[slice]:
    """Yield the ranges of ``step`` rows that make up ``rows``; the last may be shorter."""
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


class Rows:
    """An order of the rows of contiguous matrices, applied to a range of its places at a time.

    A group of rows is moved as one: that is one launch, where spelling an order out takes five.

    Args:
        order: Groups of neighbouring rows, int64, a permutation or the beginning of one. None for the rows as they are.
        height: Rows of the matrices.
    """

    def __init__(self, order: Tensor | None, height: int) -> None:
        self.order, self.group = order, group_of(order, height)

    def gather(self, x: Tensor, places: slice) -> Tensor:
        """Return the rows of ``x (height, m)`` at ``places``: a new tensor, or a view without an order."""
        if self.order is None:
            return x[places]
        index, group = self._at(places)
        rows, width = x.shape
        return x.view(rows // group, group * width).index_select(0, index).view(index.shape[0] * group, width)

    def scatter_into(self, out: Tensor, places: slice, x: Tensor) -> None:
        """Write row ``i`` of ``x (n, m)`` to the ``i``-th of the ``n`` places in ``out (height, m)``."""
        if self.order is None:
            out[places] = x
            return
        index, group = self._at(places)
        together = group * x.shape[1]
        out.view(out.shape[0] // group, together).index_copy_(0, index, x.view(x.shape[0] // group, together))

    def _at(self, places: slice) -> tuple[Tensor, int]:
        """Return the order of ``places``, and how many rows move together in it: one where places cut a group."""
        assert self.order is not None
        if places.start % self.group or places.stop % self.group:
            return self._single[places], 1
        return self.order[places.start // self.group : places.stop // self.group], self.group

    @functools.cached_property
    def _single(self) -> Tensor:
        assert self.order is not None
        return spread(self.order, self.group)


class Columns:
    """An order of the columns of matrices of one dtype, applied to a few rows at a time.

    Measured on a CPU, ns a value: fp32 alone 0.38 by ``index_select``, 0.68 by ``gather``; 16 bits alone 0.5 to 0.6 as
    integers, two to four times that as floats; in groups of 8, moved as 16 bytes, 0.13 for 16 bits and 0.3 for fp32.

    Args:
        order: Groups of ``group`` neighbouring columns, int64, a permutation or the beginning of one. None for the
            columns as they are.
        group: See :mod:`groups`.
        like: Tells dtype and device.
    """

    def __init__(self, order: Tensor | None, group: int, like: Tensor) -> None:
        self.order = order
        if order is None:
            return
        self.selects = group == 1 and like.dtype == torch.float32 and like.device.type == "cpu"
        size = group * like.element_size()
        self.bytes = next(unit for unit in (16, 8, 4, 2, 1) if size % unit == 0)
        self.index = spread(order, size // self.bytes)

    def gather_into(self, out: Tensor, x: Tensor) -> Tensor:
        """Write the columns of ``x (N, d)`` in order into ``out`` and return it; without an order, contiguous ``x``."""
        if self.order is None:
            return x.contiguous()
        if self.selects:
            return torch.index_select(x, 1, self.index, out=out)
        torch.gather(self._units(self._aligned(x)), 1, self.index.expand(x.shape[0], -1), out=self._units(out))
        return out

    def scatter_into(self, out: Tensor, x: Tensor) -> None:
        """Write column ``i`` of ``x (N, d)`` to the ``i``-th place of the order, a whole permutation, in ``out``."""
        if self.selects:
            torch.index_select(x, 1, self._inverse, out=out)
        else:
            self._units(out).scatter_(1, self.index.expand(x.shape[0], -1), self._units(self._aligned(x)))

    def _units(self, x: Tensor) -> Tensor:
        return x.view(_UNITS[self.bytes])

    def _aligned(self, x: Tensor) -> Tensor:
        """Return ``x``, or a copy where its rows are not made of whole units."""
        starts = (x.stride(0) * x.element_size(), x.storage_offset() * x.element_size())
        whole = self.bytes == x.element_size() or (x.stride(1) == 1 and not any(at % self.bytes for at in starts))
        return x if whole else x.clone(memory_format=torch.contiguous_format)

    @functools.cached_property
    def _inverse(self) -> Tensor:
        places = torch.arange(self.index.shape[0], device=self.index.device)
        return torch.empty_like(self.index).scatter_(0, self.index, places)


def columns_of(order: Tensor | None, matrix: Tensor) -> Columns:
    """Return an order ``(d / g,)`` of the columns of ``matrix (N, d)`` and of others like it."""
    return Columns(order, group_of(order, matrix.shape[1]), matrix)
