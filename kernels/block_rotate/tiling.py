"""How the columns of a block-diagonal matrix are cut into tiles, for the rotation and for the contraction.

Columns from ``n b`` on are cut as if more blocks followed. Small blocks share a tile; large blocks take several tiles:

    b <= COLUMNS    a tile holds COLUMNS // b whole blocks
    b > COLUMNS     a block is cut into ceil(b / COLUMNS) parts
"""

import triton
import triton.language as tl
from torch import Tensor

LARGEST_OFFSET = 2**31 - 1
WIDEST_LOAD = 16
"""Bytes that a thread reads at once."""


def wide(*tensors: Tensor) -> bool:
    """Tell whether offsets inside one of the matrices need 64 bits."""
    return any(
        sum((size - 1) * abs(stride) for size, stride in zip(x.shape, x.stride(), strict=True)) > LARGEST_OFFSET
        for x in tensors
    )


def tile_count(width: int, block_size: int, columns: int) -> int:
    """Return how many tiles ``width`` columns in blocks of ``block_size`` take."""
    blocks = triton.cdiv(width, block_size)
    if block_size <= columns:
        return triton.cdiv(blocks, columns // block_size)
    return blocks * triton.cdiv(block_size, columns)


@triton.jit
def locate(tile, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the first block of a tile, and for each column its block and its index in the block.

    Blocks are counted from the first one. The index is ``BLOCK`` or more where the tile reaches past its last block.
    """
    lane = tl.arange(0, COLUMNS)
    if BLOCK <= COLUMNS:
        group: tl.constexpr = COLUMNS // BLOCK
        first_block = tile * group
        member = lane // BLOCK
        index = lane % BLOCK
        # Only for tiles that are not full: with this mask the compiler would read the columns one by one.
        if COLUMNS % BLOCK != 0:
            index = tl.where(member < group, index, BLOCK)
    else:
        parts: tl.constexpr = (BLOCK + COLUMNS - 1) // COLUMNS
        first_block = tile // parts
        member = lane * 0
        index = tile % parts * COLUMNS + lane
    return first_block, member, index


@triton.jit
def in_memory(permutation, column, mask, GROUP: tl.constexpr, BLOCK: tl.constexpr, OFFSET: tl.constexpr):
    """Return the columns of the memory: through a permutation of groups, or the same columns without one."""
    if permutation is not None:
        column = tl.load(permutation + column // GROUP, mask=mask, other=0) * GROUP + column % GROUP
    column = column.to(OFFSET)
    # If blocks consist of whole groups, blocks and tiles begin with a group: the compiler may read a group at once.
    if permutation is not None and GROUP > 1 and BLOCK % GROUP == 0:
        column = tl.max_contiguous(tl.multiple_of(column, GROUP), GROUP)
    return column
