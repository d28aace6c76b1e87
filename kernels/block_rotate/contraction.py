"""Diagonal blocks of ``left.T @ right`` as Triton kernels: the gradient for a displacement.

The rows are split over programs that leave partial sums in fp32, and a second launch adds those in order. Nothing is
added atomically, and the split depends on shapes alone, so equal inputs give equal bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from orthotrain.kernels.block_rotate.tiling import in_memory, locate, tile_count, wide
from orthotrain.kernels.permutations import group_size

PROGRAMS = 512
"""Number of programs that the split of the rows aims at: a few for every multiprocessor of a large GPU."""

LARGEST_SPLIT = 64


def contraction_tiles(dtype: torch.dtype, block_size: int) -> dict[str, int]:
    """Return the tile constants of a launch for a dtype and block size: one table for every device."""
    if dtype == torch.float32:
        return {"ROWS": 32, "COLUMNS": 32, "num_warps": 4, "num_stages": 2}
    if block_size <= 64:
        return {"ROWS": 64, "COLUMNS": 64, "num_warps": 8, "num_stages": 2}
    return {"ROWS": 32, "COLUMNS": 128, "num_warps": 8, "num_stages": 2}


def split_count(rows: int, tiles: int, tile_rows: int) -> int:
    """Return into how many parts to split the rows, from shapes alone."""
    useful = triton.cdiv(rows, 4 * tile_rows)
    return max(1, min(triton.cdiv(PROGRAMS, tiles), useful, LARGEST_SPLIT))


@triton.jit
def _contract_kernel(
    left,
    right,
    left_permutation,
    right_permutation,
    out,
    rows,
    split_rows,
    blocks,
    left_row,
    left_column,
    right_row,
    right_column,
    BLOCK: tl.constexpr,
    LEFT_GROUP: tl.constexpr,
    RIGHT_GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
):
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    # A block that is cut into parts has a tile for each pair of parts; the left part changes last.
    parts: tl.constexpr = (BLOCK + COLUMNS - 1) // COLUMNS
    tile, split = tl.program_id(0), tl.program_id(1).to(tl.int64)
    right_tile = tile // (parts * parts) * parts + tile % parts
    first_block, member, i = locate(tile // parts, BLOCK, COLUMNS)
    _, _, j = locate(right_tile, BLOCK, COLUMNS)
    i_mask = (i < BLOCK) & (first_block + member < blocks)
    j_mask = (j < BLOCK) & (first_block + member < blocks)
    base = (first_block + member) * BLOCK
    left_position = in_memory(left_permutation, base + i, i_mask, LEFT_GROUP, BLOCK, OFFSET)[None, :] * left_column
    right_position = in_memory(right_permutation, base + j, j_mask, RIGHT_GROUP, BLOCK, OFFSET)[None, :] * right_column

    row = tl.arange(0, ROWS).to(OFFSET)[:, None]
    accumulator = tl.zeros((COLUMNS, COLUMNS), dtype=tl.float32)
    end = tl.minimum((split + 1) * split_rows, rows)
    for first_row in range(split * split_rows, end, ROWS):
        row_mask = first_row + row < end
        z = tl.load(left + first_row * left_row + row * left_row + left_position, row_mask & i_mask[None, :], other=0.0)
        g = tl.load(
            right + first_row * right_row + row * right_row + right_position, row_mask & j_mask[None, :], other=0.0
        )
        accumulator = tl.dot(tl.trans(z), g, accumulator, input_precision="ieee")

    out += (split * blocks + first_block) * (BLOCK * BLOCK)
    offset = member[:, None] * (BLOCK * BLOCK) + i[:, None] * BLOCK + j[None, :]
    mask = i_mask[:, None] & j_mask[None, :] & (member[:, None] == member[None, :])
    tl.store(out + offset, accumulator.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _add_splits_kernel(partial, out, size, splits, SIZE: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    total = tl.load(partial + offset, mask=offset < size, other=0.0)
    for _ in range(1, splits):
        partial += size
        total += tl.load(partial + offset, mask=offset < size, other=0.0)
    tl.store(out + offset, total.to(out.dtype.element_ty), mask=offset < size)


def contract_blocks(
    left: Tensor,
    right: Tensor,
    left_permutation: Tensor | None,
    right_permutation: Tensor | None,
    blocks: int,
    block_size: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the diagonal blocks of ``left[:, left_permutation].T @ right[:, right_permutation]``.

    Args:
        left: ``(N, d)``, any strides.
        right: ``(N, d)``, any strides, dtype of ``left``.
        left_permutation: Permutation of the columns, ``(d / g,)`` int64 (:mod:`permutations`), or None.
        right_permutation: Permutation of the columns of ``right`` likewise.
        blocks: Number of blocks ``n``.
        block_size: Size of a block ``b``, ``n * b <= d``.
        dtype: Of the result, None for that of ``left``.

    Returns:
        ``(n, b, b)``, summed in fp32.
    """
    rows = left.shape[0]
    out = torch.empty((blocks, block_size, block_size), dtype=dtype or left.dtype, device=left.device)
    if rows == 0 or out.numel() == 0:
        return out.zero_()
    constants = contraction_tiles(left.dtype, block_size)
    tile_rows, columns = constants["ROWS"], constants["COLUMNS"]
    tiles = tile_count(blocks * block_size, block_size, columns) * triton.cdiv(block_size, columns)
    splits = split_count(rows, tiles, tile_rows)
    split_rows = triton.cdiv(triton.cdiv(rows, splits), tile_rows) * tile_rows
    splits = triton.cdiv(rows, split_rows)
    sums = out if splits == 1 else torch.empty((splits, *out.shape), dtype=torch.float32, device=left.device)
    _contract_kernel[(tiles, splits)](
        *(left, right, left_permutation, right_permutation, sums, rows, split_rows, blocks),
        *(*left.stride(), *right.stride()),
        BLOCK=block_size,
        LEFT_GROUP=group_size(left_permutation, left.shape[1]),
        RIGHT_GROUP=group_size(right_permutation, right.shape[1]),
        WIDE=wide(left, right),
        **constants,
    )
    if splits > 1:
        size = 1024
        _add_splits_kernel[(triton.cdiv(out.numel(), size),)](sums, out, out.numel(), splits, SIZE=size)
    return out
