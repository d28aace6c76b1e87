"""Working through a batch of blocks a few at a time on the CPU, so that what lies in between stays in the cache.

A chain of products over hundreds of blocks writes every step to memory, and as the C library gives large buffers back
to the system, each step takes fresh pages and has them cleared. Measured for 544 blocks of 32 in fp32, Cayley-Neumann
of order 4: forward 3.8 ms at once and 1.3 ms in parts, backward 10.7 and 3.1 ms (one thread).
"""

from collections.abc import Callable

import torch
from torch import Tensor

PART_BYTES = 2**18
"""Bytes of a matrix for the blocks of one part: the half dozen of a chain fit in the cache together."""


def in_parts(
    function: Callable[..., Tensor], *operands: Tensor, block_size: int, part_bytes: int | None = None
) -> Tensor:
    """Return ``function(*operands)``, where block ``i`` of the result depends on row ``i`` of every operand alone.

    Args:
        function: Takes the operands, or some rows of them, and returns as many blocks or rows of generators.
        operands: Tensors ``(n, ...)``.
        block_size: Rows and columns of a block.
        part_bytes: Of the blocks of one part in fp32 or wider, None for ``PART_BYTES``.
    """
    first = operands[0]
    count = first.shape[0]
    itemsize = torch.promote_types(first.dtype, torch.float32).itemsize
    step = max(1, (part_bytes or PART_BYTES) // (block_size * block_size * itemsize))
    if first.device.type != "cpu" or count <= step:
        return function(*operands)
    out: Tensor | None = None
    for start in range(0, count, step):
        part = function(*(operand[start : start + step] for operand in operands))
        if out is None:
            out = part.new_empty(count, *part.shape[1:])
        out[start : start + step] = part
    assert out is not None
    return out
