"""Takes batches of blocks and long matrices in parts that stay in the CPU's cache; solves and inverts blocks.

A chain of products over hundreds of blocks writes every step to memory. The C library gives large buffers back to the
system, so each step also takes fresh pages and has them cleared. Measured for 544 blocks of 32 in fp32, Cayley-Neumann
of order 4: forward 3.8 ms at once and 1.3 ms in parts, backward 10.7 and 3.1 ms (one thread).

The same holds for a permuted matrix as a whole (block_rotate/README.md, "Rows at a time"): rows are taken in chunks.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

PART_BYTES = 2**18
"""Bytes of the blocks of one part: the half dozen matrices of a chain of products fit in the cache together."""

CHUNK_BYTES = 2**21
"""Bytes of a chunk of rows: a few of them fit in the cache, and its products are large enough to be fast."""

# Wide blocks on a CPU are solved one after another, each with all threads: of a batch of systems wider than LAPACK's
# panel MKL exchanges the wrong rows in torch 2.13 when there is more than one thread ("Parameter 6 ... SLASWP").
WIDEST_BATCHED_ON_CPU = 128


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


def chunk_rows(matrix: Tensor) -> int:
    """Return how many rows of ``(N, d)`` make a chunk, at least 1; on other devices than the CPU all of them."""
    fitting = CHUNK_BYTES // max(1, matrix.shape[1] * matrix.element_size())
    return max(1, min(fitting, matrix.shape[0]) if matrix.device.type == "cpu" else matrix.shape[0])


def row_chunks(rows: int, step: int) -> Iterator[slice]:
    """Yield the ranges of ``step`` rows that make up ``rows``; the last may be shorter."""
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def solve_blocks(systems: Tensor, right: Tensor, left: bool = True) -> Tensor:
    """Return ``A_k^-1 B_k``, or ``B_k A_k^-1`` if not ``left``, ``(n, b, b)``.

    The systems must be regular: nothing checks it, which would wait for the device.

    Args:
        systems: ``A (n, b, b)``, fp32 or fp64.
        right: ``B (n, b, b)`` of the same dtype.
        left: On which side of B the inverse stands.
    """
    if systems.device.type == "cpu" and systems.shape[-1] > WIDEST_BATCHED_ON_CPU and systems.shape[0]:
        pairs = zip(systems, right, strict=True)
        return torch.stack([torch.linalg.solve_ex(a, b, left=left)[0] for a, b in pairs])
    return torch.linalg.solve_ex(systems, right, left=left)[0]


def gram_deviation(displacement: Tensor) -> Tensor:
    """Return ``E = R^T R - I = D + D^T + D^T D`` of ``D (n, b, b)``, in fp32 or wider: without I no digits cancel."""
    d = displacement.to(torch.promote_types(displacement.dtype, torch.float32))
    return torch.baddbmm(d, d.mT, d).add_(d.mT)


def largest_norm(deviation: Tensor) -> float:
    """Return the largest norm of a block of ``E (n, b, b)``, 0 without blocks."""
    return float(torch.linalg.vector_norm(deviation, dim=(1, 2)).amax()) if deviation.numel() else 0.0


def inverts_by_transposing(norm: float, dtype: torch.dtype) -> bool:
    """Tell whether ``R (I - E)`` is ``R^-T`` to the rounding of ``dtype``: its relative error is ``||E||^2``."""
    return norm < torch.finfo(dtype).eps ** 0.5


def times_inverse_transpose(matrix: Tensor, displacement: Tensor, deviation: Tensor) -> Tensor:
    """Return ``S R^-T = S R (I - E)`` for ``S (n, b, b)``, in its dtype; see :func:`inverts_by_transposing`."""
    wide = matrix.to(deviation.dtype)
    product = torch.baddbmm(wide, wide, displacement.to(deviation.dtype))
    return torch.baddbmm(product, product, deviation, alpha=-1).to(matrix.dtype)


def inverse_transpose_times(matrix: Tensor, displacement: Tensor, deviation: Tensor) -> Tensor:
    """Return ``R^-T S = R (I - E) S`` for ``S (n, b, b)``, in its dtype; see :func:`inverts_by_transposing`."""
    wide = matrix.to(deviation.dtype)
    product = torch.baddbmm(wide, deviation, wide, alpha=-1)
    return torch.baddbmm(product, displacement.to(deviation.dtype), product).to(matrix.dtype)
