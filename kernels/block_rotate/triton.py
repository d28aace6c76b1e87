"""Block rotation as a Triton kernel, forward and backward; derivation and traffic are in README.md beside this file.

A program computes one tile of the result: some rows, and the columns of a few whole blocks or of a part of one block.
It reads its columns through one permutation and writes them through another. Columns past the last block are tiles with
a displacement of zero. With many rows, a permutation of single columns is a pass of its own (permute_columns.py).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from orthotrain.kernels.block_rotate import contraction, permute_columns
from orthotrain.kernels.block_rotate.tiling import in_memory, locate, tile_count, wide
from orthotrain.kernels.permutations import group_size


def rotation_tiles(dtype: torch.dtype, block_size: int) -> dict[str, int]:
    """Return the tile constants of a launch for a dtype and block size.

    One table for every device: its tiles take less than the 99 KiB of shared memory that all of them have, and a fixed
    choice gives equal bits from run to run. Products in 16 bits go to the tensor cores, which want wide tiles; products
    in fp32 are exact multiply-adds, where wide tiles spill registers.
    """
    if dtype == torch.float32:
        return {"ROWS": 32, "COLUMNS": 32, "num_warps": 4, "num_stages": 2}
    if block_size <= 64:
        return {"ROWS": 128, "COLUMNS": 64, "num_warps": 8, "num_stages": 2}
    return {"ROWS": 64, "COLUMNS": 128, "num_warps": 8, "num_stages": 2}


@triton.jit
def _rotate_kernel(
    x,
    displacement,
    gather,
    scatter,
    y,
    rows,
    width,
    blocks,
    tiles,
    x_row,
    x_column,
    y_row,
    y_column,
    BLOCK: tl.constexpr,
    GATHER_GROUP: tl.constexpr,
    SCATTER_GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    WIDE: tl.constexpr,
):
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    D_ROW: tl.constexpr = 1 if TRANSPOSED else BLOCK
    D_COLUMN: tl.constexpr = BLOCK if TRANSPOSED else 1
    # Neighboring programs share their rows: the other columns of a gathered sector are then found in the L2 cache.
    tile = tl.program_id(0) % tiles
    first_row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS).to(OFFSET)[:, None]
    row_mask = first_row + row < rows
    x += first_row * x_row
    y += first_row * y_row
    first_block, member, index = locate(tile, BLOCK, COLUMNS)
    displacement += first_block.to(tl.int64) * (BLOCK * BLOCK)

    accumulator = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    if BLOCK > COLUMNS and first_block < blocks:
        parts: tl.constexpr = (BLOCK + COLUMNS - 1) // COLUMNS
        for step in range(1, parts):
            inner = (tile + step) % parts * COLUMNS + tl.arange(0, COLUMNS)
            inner_column = first_block * BLOCK + inner
            position = in_memory(gather, inner_column, inner < BLOCK, GATHER_GROUP, BLOCK, OFFSET)[None, :]
            z = tl.load(x + row * x_row + position * x_column, mask=row_mask & (inner < BLOCK)[None, :], other=0.0)
            d_mask = (inner < BLOCK)[:, None] & (index < BLOCK)[None, :]
            d = tl.load(displacement + inner[:, None] * D_ROW + index[None, :] * D_COLUMN, mask=d_mask, other=0.0)
            accumulator = tl.dot(z, d, accumulator, input_precision="ieee")

    # The tile's own columns come last, so that the large term is added once, to the finished sum of the small ones.
    column = (first_block + member) * BLOCK + index
    mask = (index < BLOCK) & (column < width)
    position = in_memory(gather, column, mask, GATHER_GROUP, BLOCK, OFFSET)[None, :]
    z = tl.load(x + row * x_row + position * x_column, mask=row_mask & mask[None, :], other=0.0)
    known = (index < BLOCK) & (first_block + member < blocks)
    d_mask = known[:, None] & known[None, :] & (member[:, None] == member[None, :])
    d_offset = member[:, None] * (BLOCK * BLOCK) + index[:, None] * D_ROW + index[None, :] * D_COLUMN
    d = tl.load(displacement + d_offset, mask=d_mask, other=0.0)
    accumulator = tl.dot(z, d, accumulator, input_precision="ieee") + z.to(tl.float32)
    position = in_memory(scatter, column, mask, SCATTER_GROUP, BLOCK, OFFSET)[None, :]
    tl.store(y + row * y_row + position * y_column, accumulator.to(y.dtype.element_ty), mask=row_mask & mask[None, :])


def rotate(
    x: Tensor,
    displacement: Tensor,
    gather: Tensor | None,
    scatter: Tensor | None,
    y: Tensor,
    *,
    transposed: bool = False,
) -> Tensor:
    """Write ``z + z Diag(D)``, ``z = x[:, gather]``, to ``y[:, scatter]`` and return ``y``.

    Args:
        x: ``(N, d)``, any strides.
        displacement: ``(n, b, b)`` contiguous, ``n * b <= d``, dtype of ``x``.
        gather: Permutation of the columns, ``(d / g,)`` int64 (:mod:`permutations`), or None.
        scatter: Permutation by which the columns are written, or None.
        y: ``(N, d)``, any strides, every element of it is written.
        transposed: Whether to rotate with ``D_k^T``.
    """
    (rows, width), (blocks, block_size, _) = x.shape, displacement.shape
    if x.numel() == 0:
        return y
    block_size = max(block_size, 1)
    constants = rotation_tiles(x.dtype, block_size)
    across = tile_count(width, block_size, constants["COLUMNS"])
    _rotate_kernel[(across * triton.cdiv(rows, constants["ROWS"]),)](
        *(x, displacement, gather, scatter, y, rows, width, blocks, across, *x.stride(), *y.stride()),
        BLOCK=block_size,
        GATHER_GROUP=group_size(gather, width),
        SCATTER_GROUP=group_size(scatter, width),
        TRANSPOSED=transposed,
        WIDE=wide(x, y),
        **constants,
    )
    return y


def block_rotate_forward(x: Tensor, displacement: Tensor, gather: Tensor | None, scatter: Tensor | None) -> Tensor:
    """Rotate blocks of the last axis; ``cpu.py`` describes the arguments."""
    source, gather = gathered(x.reshape(-1, x.shape[-1]), gather)
    return rotate_scattered(source, displacement.contiguous(), gather, scatter).view(x.shape)


def block_rotate_backward(
    grad: Tensor,
    x: Tensor,
    displacement: Tensor,
    gather: Tensor | None,
    scatter: Tensor | None,
    need_x: bool = True,
    need_displacement: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients for ``x`` (the same rotation in reverse) and ``displacement`` (a contraction over rows)."""
    width, (blocks, block_size, _), grad_displacement = x.shape[-1], displacement.shape, None
    grad, grad_index = gathered(grad.reshape(-1, width), scatter)
    if need_displacement:
        source, source_index = gathered(x.reshape(-1, width), gather)
        grad_displacement = contraction.contract_blocks(source, grad, source_index, grad_index, blocks, block_size)
        del source
    if not need_x:
        return None, grad_displacement
    grad_x = rotate_scattered(grad, displacement.contiguous(), grad_index, gather, transposed=True)
    return grad_x.view(x.shape), grad_displacement


def gathered(x: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the permuted ``x`` and None where a separate pass pays, else ``x`` and the permutation unchanged."""
    if index is None or not permute_columns.worthwhile(x, index):
        return x, index
    return permute_columns.gather_columns(x, index), None


def rotate_scattered(
    x: Tensor, displacement: Tensor, gather: Tensor | None, scatter: Tensor | None, *, transposed: bool = False
) -> Tensor:
    """Return a new ``y`` from :func:`rotate`, whose columns are scattered in a separate pass where that pays."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if scatter is None or not permute_columns.worthwhile(y, scatter):
        return rotate(x, displacement, gather, scatter, y, transposed=transposed)
    return permute_columns.scatter_columns_(rotate(x, displacement, gather, None, y, transposed=transposed), scatter)
