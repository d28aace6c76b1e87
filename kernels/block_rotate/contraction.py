"""Diagonal blocks of ``left.T @ right`` as Triton kernels: the gradient for a displacement.

The rows are split over programs that leave partial sums in fp32, and a second launch adds those in order. Nothing is
added atomically and the split depends on shapes alone, so that equal inputs give equal bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from orthotrain.kernels.ahead_of_time import Variant
from orthotrain.kernels.block_rotate.tiling import (
    POINTERS,
    WIDEST_LOAD,
    Tiles,
    in_memory,
    locate,
    permutation_suffix,
    tile_count,
    wide,
)
from orthotrain.kernels.permutations import group_size

PROGRAMS = 512
"""Programs to aim at when the rows are split: a few for every multiprocessor of a large GPU."""

LARGEST_SPLIT = 64


def contraction_tiles(dtype: torch.dtype, block_size: int) -> Tiles:
    """Return the tile sizes for a dtype and block size: one table for every device, as for the rotation."""
    if dtype == torch.float32:
        return Tiles(rows=32, columns=32, warps=4, stages=2)
    if block_size <= 64:
        return Tiles(rows=64, columns=64, warps=8, stages=2)
    return Tiles(rows=32, columns=128, warps=8, stages=2)


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
    # A block in parts has a tile for each pair of them: the left part is the slow one.
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
        right_permutation: The same of ``right``.
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
    sizes = contraction_tiles(left.dtype, block_size)
    tiles = tile_count(blocks * block_size, block_size, sizes.columns) * triton.cdiv(block_size, sizes.columns)
    splits = split_count(rows, tiles, sizes.rows)
    split_rows = triton.cdiv(triton.cdiv(rows, splits), sizes.rows) * sizes.rows
    splits = triton.cdiv(rows, split_rows)
    sums = out if splits == 1 else torch.empty((splits, *out.shape), dtype=torch.float32, device=left.device)
    _contract_kernel[(tiles, splits)](
        *(
            left,
            right,
            left_permutation,
            right_permutation,
            sums,
            rows,
            split_rows,
            blocks,
            *left.stride(),
            *right.stride(),
        ),
        BLOCK=block_size,
        LEFT_GROUP=group_size(left_permutation, left.shape[1]),
        RIGHT_GROUP=group_size(right_permutation, right.shape[1]),
        ROWS=sizes.rows,
        COLUMNS=sizes.columns,
        WIDE=wide(left, right),
        num_warps=sizes.warps,
        num_stages=sizes.stages,
    )
    if splits > 1:
        size = 1024
        _add_splits_kernel[(triton.cdiv(out.numel(), size),)](sums, out, out.numel(), splits, SIZE=size)
    return out


def aot_variants() -> list[Variant]:
    """Return the launches to compile ahead of time."""
    return [
        contraction_variant(torch.bfloat16, 16, group=1),
        contraction_variant(torch.bfloat16, 32, group=1),
        contraction_variant(torch.bfloat16, 32, group=8),
        contraction_variant(torch.bfloat16, 256, group=8),
        contraction_variant(torch.bfloat16, 256),
        contraction_variant(torch.bfloat16, 256).unaligned("left", "right"),
        contraction_variant(torch.float16, 256, group=1, wide=True),
        contraction_variant(torch.float32, 256),
        add_splits_variant(torch.bfloat16),
    ]


def add_splits_variant(dtype: torch.dtype) -> Variant:
    """Return the launch that adds partial sums up to a result of a dtype."""
    pointer = POINTERS[dtype]
    return Variant(
        f"add-splits-{pointer[1:]}",
        _add_splits_kernel,
        {"partial": "*fp32", "out": pointer, "size": "i32", "splits": "i32"},
        {"SIZE": 1024},
        aligned=("size",),
    )


def contraction_variant(
    dtype: torch.dtype,
    block_size: int,
    *,
    group: int | None = None,
    columns_first: bool = False,
    wide: bool = False,
) -> Variant:
    """Return one launch of the contraction, of matrices in rows or in columns, permuted by groups or not."""
    tiles, pointer = contraction_tiles(dtype, block_size), POINTERS[dtype]
    unit, strided = ("row", "column") if columns_first else ("column", "row")
    permutations = ("left_permutation", "right_permutation")
    return Variant(
        f"contract-b{block_size}-{pointer[1:]}{permutation_suffix(group)}"
        f"{'-transposed' * columns_first}{'-wide' * wide}",
        _contract_kernel,
        {
            **{"left": pointer, "right": pointer, "out": "*fp32"},
            **({} if group is None else dict.fromkeys(permutations, "*i64")),
            **dict.fromkeys(("rows", "split_rows", "blocks", f"left_{strided}", f"right_{strided}"), "i32"),
        },
        {
            **(dict.fromkeys(permutations) if group is None else {}),
            **{f"left_{unit}": 1, f"right_{unit}": 1, "BLOCK": block_size, "WIDE": wide},
            **{"LEFT_GROUP": group or 1, "RIGHT_GROUP": group or 1},
            **{"ROWS": tiles.rows, "COLUMNS": tiles.columns},
        },
        num_warps=tiles.warps,
        num_stages=tiles.stages,
        tensor_cores=dtype != torch.float32,
        vectors=group is None or group * dtype.itemsize >= WIDEST_LOAD,
        aligned=("rows", "split_rows", f"left_{strided}", f"right_{strided}"),
    )
