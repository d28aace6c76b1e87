"""Skew-symmetric blocks on the GPU: every generator is read once, and every row is written in one piece.

A program computes a pair of tiles, (I, J) on or above the diagonal and its mirror image (J, I), of one block or of as
many small blocks as fill a program. A tile is transposed in shared memory, never by scattered writes.
"""

import triton
from torch import Tensor
from triton import language as tl

ELEMENTS = 4096
"""Entries of one program's tile: 32 a thread with four warps."""


@triton.jit
def upper_index(i, j, size: tl.constexpr):
    """Return the index of entry (i, j), i < j, in the strict upper triangle of a ``size x size`` block, row-major."""
    return i * (2 * size - i - 1) // 2 + (j - i - 1)


@triton.jit
def _tile(group, row_tile, column_tile, blocks, size: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr):
    """Return the block ``(GROUP, 1, 1)``, row ``(1, TILE, 1)`` and column ``(1, 1, TILE)`` of a tile, and its mask."""
    block = group.to(tl.int64) * GROUP + tl.arange(0, GROUP)[:, None, None]
    row = row_tile * TILE + tl.arange(0, TILE)[None, :, None]
    column = column_tile * TILE + tl.arange(0, TILE)[None, None, :]
    return block, row, column, (block < blocks) & (row < size) & (column < size)


@triton.jit
def _skew_forward_kernel(generators, q, blocks, size: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr):
    group, i, j = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if i > j:
        return
    block, row, column, inside = _tile(group, i, j, blocks, size, TILE, GROUP)
    position = block * (size * (size - 1) // 2) + upper_index(row, column, size)
    upper = tl.load(generators + position, mask=inside & (row < column), other=0.0)
    # 0 - x and not -x: it is exact and gives +0 on the diagonal
    lower = 0.0 - tl.trans(upper, 0, 2, 1).to(tl.float32)
    if i == j:
        upper = (upper + lower).to(upper.dtype)
    tl.store(q + block * (size * size) + row * size + column, upper, mask=inside)
    if i < j:
        block, row, column, inside = _tile(group, j, i, blocks, size, TILE, GROUP)
        tl.store(q + block * (size * size) + row * size + column, lower.to(upper.dtype), mask=inside)


@triton.jit
def _skew_backward_kernel(grad, out, blocks, size: tl.constexpr, TILE: tl.constexpr, GROUP: tl.constexpr):
    group, i, j = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if i > j:
        return
    block, row, column, inside = _tile(group, j, i, blocks, size, TILE, GROUP)
    lower = tl.load(grad + block * (size * size) + row * size + column, mask=inside, other=0.0)
    block, row, column, inside = _tile(group, i, j, blocks, size, TILE, GROUP)
    inside = inside & (row < column)
    upper = tl.load(grad + block * (size * size) + row * size + column, mask=inside, other=0.0)
    difference = upper.to(tl.float32) - tl.trans(lower, 0, 2, 1).to(tl.float32)
    position = block * (size * (size - 1) // 2) + upper_index(row, column, size)
    tl.store(out + position, difference.to(upper.dtype), mask=inside)


def skew_forward(generators: Tensor, block_size: int) -> Tensor:
    """Return Q, shape ``(n, block_size, block_size)``, from generators of shape ``(n, b(b-1)/2)``; Q^T = -Q exactly."""
    blocks = generators.shape[0]
    out = generators.new_empty(blocks, block_size, block_size)
    if out.numel():
        _skew_forward_kernel[_grid(blocks, block_size)](
            generators.contiguous(), out, blocks, block_size, **tiling(block_size)
        )
    return out


def skew_backward(grad: Tensor) -> Tensor:
    """Return dL/dgenerators, shape ``(n, b(b-1)/2)``, from dL/dQ, shape ``(n, b, b)``: upper minus mirrored lower."""
    blocks, block_size, _ = grad.shape
    out = grad.new_empty(blocks, block_size * (block_size - 1) // 2)
    if out.numel():
        _skew_backward_kernel[_grid(blocks, block_size)](
            grad.contiguous(), out, blocks, block_size, **tiling(block_size)
        )
    return out


def tiling(block_size: int) -> dict[str, int]:
    """Return the tile of a block size: up to 64 x 64 of one block, or several small blocks of ``ELEMENTS`` in all."""
    tile = min(64, triton.next_power_of_2(block_size))
    return {"TILE": tile, "GROUP": ELEMENTS // tile**2 if tile < 64 else 1}


def _grid(blocks: int, block_size: int) -> tuple[int, int, int]:
    tile = tiling(block_size)
    across = triton.cdiv(block_size, tile["TILE"])
    return triton.cdiv(blocks, tile["GROUP"]), across, across
