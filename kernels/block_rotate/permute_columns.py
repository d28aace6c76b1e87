"""Permuting the columns of a matrix, a row at a time through shared memory, as Triton kernels.

A gather of single 16-bit columns from memory fetches a sector of 32 bytes for each 2 bytes that it needs. Here a
program reads whole rows with wide loads, picks the columns from shared memory and writes wide again. A program reads
all of its rows before it writes them, so a matrix may be permuted in place.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from orthotrain.kernels.block_rotate.tiling import LARGEST_OFFSET, WIDEST_LOAD
from orthotrain.kernels.permutations import by_feature, group_size

LARGEST_ROW = 64 * 1024
"""Bytes of a row: on every device two programs with such a row fit into the shared memory."""

FEWEST_ROWS = 256
"""With fewer rows the launches cost more than the wasted sectors, which the L2 cache serves."""

TILE = 4096
PROGRAMS = 2048


@triton.jit
def _permute_kernel(x, permutation, y, rows, width, chunk, x_row, y_row, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    # Flat, since a gather along one axis of two would be made of register shuffles.
    lane = tl.arange(0, ROWS * WIDTH)
    row, column = lane // WIDTH, lane % WIDTH
    inside = column < width
    source = row * WIDTH + tl.load(permutation + column, mask=inside, other=0).to(tl.int32)
    first = tl.program_id(0).to(tl.int64) * chunk
    end = tl.minimum(first + chunk, rows)
    for start in range(first, end, ROWS):
        mask = inside & (start + row < end)
        z = tl.load(x + start * x_row + row * x_row + column, mask=mask, other=0.0)
        tl.store(y + start * y_row + row * y_row + column, tl.gather(z, source, 0), mask=mask)


@triton.jit
def _invert_kernel(permutation, inverse, width, SIZE: tl.constexpr):
    position = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    mask = position < width
    tl.store(inverse + tl.load(permutation + position, mask=mask, other=0), position.to(tl.int64), mask=mask)


def worthwhile(x: Tensor, permutation: Tensor) -> bool:
    """Tell whether permuting ``x (N, d)`` in a pass of its own is possible and pays.

    Otherwise the rotation gathers from memory, which is fast where a group of columns is as wide as a load of a thread.
    """
    (rows, width), (row, column) = x.shape, x.stride()
    if group_size(permutation, width) * x.element_size() >= WIDEST_LOAD:
        return False
    fits = 0 < width * x.element_size() <= LARGEST_ROW and rows_at_once(width) * row <= LARGEST_OFFSET
    return fits and rows >= FEWEST_ROWS and column == 1


def rows_at_once(width: int) -> int:
    """Return how many rows of ``width`` columns a program holds; its offsets within them are of 32 bits."""
    return max(1, TILE // triton.next_power_of_2(width))


def gather_columns(x: Tensor, permutation: Tensor) -> Tensor:
    """Return ``x[:, permutation]``, contiguous, for an ``x`` that is :func:`worthwhile`."""
    permutation = by_feature(permutation, x.shape[1])
    return _permute(x, permutation, torch.empty(x.shape, dtype=x.dtype, device=x.device))


def scatter_columns_(x: Tensor, permutation: Tensor) -> Tensor:
    """Move column ``i`` of ``x`` to ``permutation[i]``, in place, for an ``x`` that is :func:`worthwhile`."""
    permutation = by_feature(permutation, x.shape[1])
    inverse = torch.empty_like(permutation)
    size = 1024
    _invert_kernel[(triton.cdiv(permutation.numel(), size),)](permutation, inverse, permutation.numel(), SIZE=size)
    return _permute(x, inverse, x)


def _permute(x: Tensor, permutation: Tensor, y: Tensor) -> Tensor:
    rows, width = x.shape
    padded, at_once = triton.next_power_of_2(width), rows_at_once(width)
    chunk = triton.cdiv(triton.cdiv(rows, PROGRAMS), at_once) * at_once
    _permute_kernel[(triton.cdiv(rows, chunk),)](
        *(x, permutation, y, rows, width, chunk, x.stride(0), y.stride(0)),
        ROWS=at_once,
        WIDTH=padded,
        num_warps=max(4, padded // 1024),
    )
    return y
