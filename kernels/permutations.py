"""Permutations of features, alone or in groups of neighbors, and how the CPU moves rows and columns by them.

A permutation of ``d`` features is ``(d / g,)`` int64: position ``i`` holds group ``p = permutation[i]``, the features
from ``g p`` to ``g p + g - 1``, with ``g`` of 1, 2, 4 or 8. Groups let memory be read in pieces of up to 16 bytes.
"""

import functools

import torch
from torch import Tensor

GROUPS = (8, 4, 2, 1)
"""Numbers of features that may move together: 8 features of 16 bits are the widest load of a thread of a GPU."""

_UNITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
"""The dtype as which so many bytes are moved. Values are copied, never computed with, so all bits are kept."""


def group_size(permutation: Tensor | None, width: int) -> int:
    """Return how many neighboring features of ``width`` a permutation moves together, 1 without a permutation."""
    return 1 if permutation is None or not permutation.shape[0] else width // permutation.shape[0]


def by_feature(permutation: Tensor, width: int) -> Tensor:
    """Return a permutation of groups as a permutation of single features, ``(width,)``."""
    return _expanded(permutation, group_size(permutation, width))


def _expanded(permutation: Tensor, group: int) -> Tensor:
    """Return ``g permutation[i] .. g permutation[i] + g - 1`` for every ``i``: ``(n,) -> (n g,)``."""
    if group == 1:
        return permutation
    return (permutation[:, None] * group + torch.arange(group, device=permutation.device)).flatten()


class RowPermutation:
    """Moves rows of contiguous matrices by a permutation, a range of its positions at a time.

    Groups of rows are moved in one launch. A permutation of single rows would take five launches to compute.

    Args:
        permutation: Of groups of neighboring rows, int64, or the beginning of one. None leaves the rows where they are.
        height: Rows of the matrices.
    """

    def __init__(self, permutation: Tensor | None, height: int) -> None:
        self.permutation, self.group = permutation, group_size(permutation, height)

    def gather(self, x: Tensor, positions: slice) -> Tensor:
        """Return the rows of ``x (height, m)`` for ``positions``: a new tensor, or a view without a permutation."""
        if self.permutation is None:
            return x[positions]
        index, group = self._at(positions)
        rows, width = x.shape
        return x.view(rows // group, group * width).index_select(0, index).view(index.shape[0] * group, width)

    def scatter_into(self, out: Tensor, positions: slice, x: Tensor) -> None:
        """Write row ``i`` of ``x (n, m)`` to the row of ``out (height, m)`` that ``positions[i]`` names."""
        if self.permutation is None:
            out[positions] = x
            return
        index, group = self._at(positions)
        together = group * x.shape[1]
        out.view(out.shape[0] // group, together).index_copy_(0, index, x.view(x.shape[0] // group, together))

    def _at(self, positions: slice) -> tuple[Tensor, int]:
        """Return the permutation at ``positions``, and its group: 1 where the positions cut a group."""
        assert self.permutation is not None
        if positions.start % self.group or positions.stop % self.group:
            return self._single[positions], 1
        return self.permutation[positions.start // self.group : positions.stop // self.group], self.group

    @functools.cached_property
    def _single(self) -> Tensor:
        assert self.permutation is not None
        return _expanded(self.permutation, self.group)


class ColumnPermutation:
    """Moves columns of matrices of one dtype by a permutation, a few rows at a time.

    Measured on a CPU, ns a value: single fp32 0.38 by ``index_select``, 0.68 by ``gather``; single 16 bits 0.5 to 0.6
    as integers, two to four times that as floats; in groups of 8, moved as 16 bytes, 0.13 for 16 bits and 0.3 for fp32.

    Args:
        permutation: Of groups of neighboring columns, int64, or the beginning of one. None leaves the columns where
            they are.
        like: Matrix ``(N, d)`` with the width, dtype and device of those to permute.
        group: Columns of a group, None for those of a whole permutation of ``d`` columns.
    """

    def __init__(self, permutation: Tensor | None, like: Tensor, group: int | None = None) -> None:
        self.permutation = permutation
        if permutation is None:
            return
        group = group or group_size(permutation, like.shape[1])
        self.selects = group == 1 and like.dtype == torch.float32 and like.device.type == "cpu"
        size = group * like.element_size()
        self.bytes = next(unit for unit in (16, 8, 4, 2, 1) if size % unit == 0)
        self.index = _expanded(permutation, size // self.bytes)

    def gather_into(self, out: Tensor, x: Tensor) -> Tensor:
        """Write the permuted columns of ``x (N, d)`` to ``out`` and return it; without permutation contiguous ``x``."""
        if self.permutation is None:
            return x.contiguous()
        if self.selects:
            return torch.index_select(x, 1, self.index, out=out)
        torch.gather(self._units(self._aligned(x)), 1, self.index.expand(x.shape[0], -1), out=self._units(out))
        return out

    def scatter_into(self, out: Tensor, x: Tensor) -> None:
        """Write column ``i`` of ``x (N, d)`` to column ``permutation[i]`` of ``out``, for a whole permutation."""
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
        positions = torch.arange(self.index.shape[0], device=self.index.device)
        return torch.empty_like(self.index).scatter_(0, self.index, positions)
