"""Triton kernels that run chains of matrix products: all steps of a block in one program, or one step of all blocks.

The matrices of a program are in memory, not in registers, and every product is a loop over slices of them. A 64 x 64
product with its fp32 operands in registers would spill on every GPU. The memory of a program is small enough to stay in
the L2 cache.
"""

import triton
from triton import language as tl

from orthotrain.kernels.skew.triton import upper_index

ROW = tl.constexpr(16)
"""Words of one step in the table that ``fused_chain_kernel`` reads."""


@triton.jit
def input_tile(pointer, block, blocks, size: tl.constexpr, TILE: tl.constexpr):
    """Return pointers to one tile of blocks and their mask.

    Small blocks share a tile: as many as fit stand along its diagonal, with zeros between them, which products keep.
    """
    PACK: tl.constexpr = TILE // size
    row, column = tl.arange(0, TILE)[:, None], tl.arange(0, TILE)[None, :]
    inside = (row < size * PACK) & (column < size * PACK)
    pointer += block * tl.full((), size * size, tl.int64)
    if PACK > 1:
        inside = inside & (row // size == column // size) & (block + row // size < blocks)
        return pointer + (row // size * (size * size) + row % size * size + column % size), inside
    return pointer + (row * size + column), inside


@triton.jit
def generator_tile(pointer, block, blocks, size: tl.constexpr, TILE: tl.constexpr):
    """Return pointers to the generators of one tile of blocks, above its diagonal, and their mask."""
    row, column = tl.arange(0, TILE)[:, None], tl.arange(0, TILE)[None, :]
    _, inside = input_tile(pointer, block, blocks, size, TILE)
    offset = (row // size) * (size * (size - 1) // 2) + upper_index(row % size, column % size, size)
    pointer += block * tl.full((), size * (size - 1) // 2, tl.int64)
    return pointer + offset, inside & (row < column)


@triton.jit
def square_tile(memory, TILE: tl.constexpr):
    """Return pointers to a dense ``TILE x TILE`` matrix."""
    return memory + tl.arange(0, TILE)[:, None] * TILE + tl.arange(0, TILE)[None, :]


@triton.jit
def add_product(acc, left, right, TILE: tl.constexpr, K_TILE: tl.constexpr, PRECISION: tl.constexpr):
    """Return ``acc + left @ right`` for dense ``TILE x TILE`` matrices in memory."""
    span, inner = tl.arange(0, TILE), tl.arange(0, K_TILE)
    for start in range(0, TILE, K_TILE):
        a = tl.load(left + span[:, None] * TILE + (start + inner)[None, :])
        b = tl.load(right + (start + inner)[:, None] * TILE + span[None, :])
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _float(word):
    return word.to(tl.float32, bitcast=True)


@triton.jit
def _run_step(memory, row, TILE: tl.constexpr, K_TILE: tl.constexpr, PRECISION: tl.constexpr):
    acc = tl.zeros((TILE, TILE), tl.float32)
    for product in range(tl.load(row + 2)):
        left = memory + tl.load(row + 4 + 2 * product) * (TILE * TILE)
        right = memory + tl.load(row + 5 + 2 * product) * (TILE * TILE)
        acc = add_product(acc, left, right, TILE, K_TILE, PRECISION)
    acc *= _float(tl.load(row + 1))
    for term in range(tl.load(row + 3)):
        matrix = memory + tl.load(row + 8 + 2 * term) * (TILE * TILE)
        acc += _float(tl.load(row + 9 + 2 * term)) * tl.load(square_tile(matrix, TILE))
    return acc


@triton.jit
def copy_input(
    pointer,
    slot,
    block,
    blocks,
    scale,
    size: tl.constexpr,
    TILE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    GENERATORS: tl.constexpr,
):
    """Put a tile of blocks, given as they are or by their generators, into memory as a dense matrix in fp32."""
    if GENERATORS:
        source, inside = generator_tile(pointer, block, blocks, size, TILE)
    else:
        source, inside = input_tile(pointer, block, blocks, size, TILE)
    x = tl.load(source, mask=inside, other=0.0).to(tl.float32) * scale
    if GENERATORS:
        x -= tl.trans(x)
    if TRANSPOSED:
        x = tl.trans(x)
    tl.store(square_tile(slot, TILE), x)


@triton.jit
def fused_chain_kernel(
    first,
    second,
    out,
    scratch,
    table,
    steps,
    slots,
    scale,
    blocks,
    size: tl.constexpr,
    INPUTS: tl.constexpr,
    GENERATORS: tl.constexpr,
    TILE: tl.constexpr,
    K_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Run a chain. A chain of two inputs is a backward: it reads ``first`` transposed.

    With ``GENERATORS``, ``first`` holds generators, and so does the gradient that a backward writes.
    """
    PACK: tl.constexpr = TILE // size
    memory = scratch + tl.program_id(0).to(tl.int64) * slots * (TILE * TILE)
    for group in range(tl.program_id(0), tl.cdiv(blocks, PACK), tl.num_programs(0)):
        block = group * PACK
        copy_input(first, memory, block, blocks, scale, size, TILE, INPUTS == 2, GENERATORS)
        if INPUTS == 2:
            copy_input(second, memory + TILE * TILE, block, blocks, scale, size, TILE, False, False)
        acc = tl.zeros((TILE, TILE), tl.float32)
        for step in range(steps):
            tl.debug_barrier()
            acc = _run_step(memory, table + step * ROW, TILE, K_TILE, PRECISION)
            tl.store(square_tile(memory + tl.load(table + step * ROW) * (TILE * TILE), TILE), acc)
        if GENERATORS and INPUTS == 2:
            target, inside = generator_tile(out, block, blocks, size, TILE)
            acc -= tl.trans(acc)
        else:
            target, inside = input_tile(out, block, blocks, size, TILE)
        tl.store(target, acc.to(out.dtype.element_ty), mask=inside)
        tl.debug_barrier()


@triton.jit
def _tile_of(matrix, rows, columns, size: tl.constexpr, EVEN: tl.constexpr):
    pointer = matrix + rows[:, None] * size + columns[None, :]
    if EVEN:
        return tl.load(pointer)
    return tl.load(pointer, mask=(rows[:, None] < size) & (columns[None, :] < size), other=0.0)


@triton.jit
def chain_step_kernel(
    out,
    left_0,
    right_0,
    left_1,
    right_1,
    term_0,
    term_1,
    term_2,
    factor,
    coefficient_0,
    coefficient_1,
    coefficient_2,
    size: tl.constexpr,
    PRODUCTS: tl.constexpr,
    TERMS: tl.constexpr,
    TILE: tl.constexpr,
    K_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Run one step of a chain, ``out = sum of terms + factor * sum of products``, on one tile of a block."""
    TILES: tl.constexpr = (size + TILE - 1) // TILE
    EVEN: tl.constexpr = size % TILE == 0
    tile = tl.program_id(0) % (TILES * TILES)
    block = (tl.program_id(0) // (TILES * TILES)).to(tl.int64) * (size * size)
    rows = tile // TILES * TILE + tl.arange(0, TILE)
    columns = tile % TILES * TILE + tl.arange(0, TILE)
    acc = tl.zeros((TILE, TILE), tl.float32)
    for product in tl.static_range(PRODUCTS):
        left = (left_0 if product == 0 else left_1) + block
        right = (right_0 if product == 0 else right_1) + block
        for start in range(0, size, K_TILE):
            inner = start + tl.arange(0, K_TILE)
            a = _tile_of(left, rows, inner, size, EVEN)
            b = _tile_of(right, inner, columns, size, EVEN)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    acc *= factor
    if TERMS > 0:
        acc += coefficient_0 * _tile_of(term_0 + block, rows, columns, size, EVEN)
    if TERMS > 1:
        acc += coefficient_1 * _tile_of(term_1 + block, rows, columns, size, EVEN)
    if TERMS > 2:
        acc += coefficient_2 * _tile_of(term_2 + block, rows, columns, size, EVEN)
    inside = (rows[:, None] < size) & (columns[None, :] < size)
    target = out + block + rows[:, None] * size + columns[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=inside)
