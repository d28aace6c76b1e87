"""Block rotation of the last axis, in PyTorch for the CPU. README.md beside this file derives the gradients."""

import torch
from torch import Tensor

from orthotrain.kernels.block_batches import chunk_rows, row_chunks
from orthotrain.kernels.permutations import ColumnPermutation, group_size


def block_rotate_forward(x: Tensor, displacement: Tensor, gather: Tensor | None, scatter: Tensor | None) -> Tensor:
    """Rotate blocks of the last axis: ``z = x[..., gather]``, ``z_k += z_k @ D_k``, ``y[..., scatter] = z``.

    Args:
        x: Input ``(..., d)``.
        displacement: ``D = R - I``, ``(n, b, b)`` with ``n * b <= d``, dtype of ``x``. Coordinates past ``n * b`` pass.
        gather: Permutation by which ``x`` is read, ``(d / g,)`` (:mod:`permutations`), or None.
        scatter: Permutation by which the result is written, or None.

    Returns:
        A new tensor ``(..., d)``.
    """
    source = x.reshape(-1, x.shape[-1])
    if gather is None and scatter is None:
        return add_block_products(source.contiguous(), displacement).view(x.shape)
    out = torch.empty(source.shape, dtype=x.dtype, device=x.device)
    step = chunk_rows(source)
    reading, writing = (ColumnPermutation(permutation, source) for permutation in (gather, scatter))
    read, written = _buffer(source, step, gather), _buffer(source, step, scatter)
    for rows in row_chunks(source.shape[0], step):
        size = rows.stop - rows.start
        gathered = reading.gather_into(read[:size], source[rows])
        if scatter is None:
            add_block_products(gathered, displacement, out[rows])
        else:
            writing.scatter_into(out[rows], add_block_products(gathered, displacement, written[:size]))
    return out.view(x.shape)


def block_rotate_backward(
    grad: Tensor,
    x: Tensor,
    displacement: Tensor,
    gather: Tensor | None,
    scatter: Tensor | None,
    need_x: bool = True,
    need_displacement: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of :func:`block_rotate_forward` for ``x`` and ``displacement``, None where not needed."""
    if not need_displacement:
        return (block_rotate_forward(grad, displacement.mT.contiguous(), scatter, gather) if need_x else None), None
    source, grad = x.reshape(-1, x.shape[-1]), grad.reshape(-1, x.shape[-1])
    blocks, block_size = displacement.shape[:2]
    transposed = displacement.mT.contiguous()
    if gather is None and scatter is None:
        source, grad = source.contiguous(), grad.contiguous()
        grad_x = add_block_products(grad, transposed).view(x.shape) if need_x else None
        return grad_x, block_products(source, grad, blocks, block_size)
    grad_x = torch.empty(source.shape if need_x else 0, dtype=x.dtype, device=x.device)
    total = BlockSum(displacement)
    step = chunk_rows(source)
    reading, writing = (ColumnPermutation(permutation, source) for permutation in (gather, scatter))
    read, read_grad, written = (_buffer(source, step, permutation) for permutation in (gather, scatter, gather))
    for rows in row_chunks(source.shape[0], step):
        size = rows.stop - rows.start
        gathered = reading.gather_into(read[:size], source[rows])
        grad_rotated = writing.gather_into(read_grad[:size], grad[rows])
        total.add(gathered, grad_rotated)
        if not need_x:
            continue
        if gather is None:
            add_block_products(grad_rotated, transposed, grad_x[rows])
        else:
            reading.scatter_into(grad_x[rows], add_block_products(grad_rotated, transposed, written[:size]))
    return (grad_x.view(x.shape) if need_x else None), total.result()


class BlockSum:
    """Sums the diagonal blocks of ``left.T @ right`` over parts of the rows, in fp32 or wider.

    Args:
        displacement: Has the shape ``(n, b, b)`` and dtype of the result.
    """

    def __init__(self, displacement: Tensor) -> None:
        self.like = displacement
        self.sum: Tensor | None = None

    def add(self, left: Tensor, right: Tensor) -> None:
        """Add the products of the columns ``(rows, d)`` of the next part."""
        self.sum = _summed(self.sum, block_products(left, right, *self.like.shape[:2]))

    def result(self) -> Tensor:
        """Return the sum ``(n, b, b)``, zero if nothing was added."""
        return torch.zeros_like(self.like) if self.sum is None else self.sum.to(self.like.dtype)


def contract(left: Tensor, right: Tensor, like: Tensor, permutation: Tensor | None) -> Tensor:
    """Return the diagonal blocks of ``left[:, p].T @ right[:, p]``, both ``(N, d)``, computed a chunk at a time.

    Args:
        left: Activations.
        right: Gradients for the same activations.
        like: Has the shape ``(n, b, b)`` and dtype of the result.
        permutation: ``p``, ``(d / g,)``, whose first ``n * b`` positions lie in the blocks; None for no permutation.
    """
    total, step, group = BlockSum(like), chunk_rows(left), group_size(permutation, left.shape[1])
    # columns past the last block are not moved
    covered = None if permutation is None else permutation[: -(-like.shape[0] * like.shape[1] // group)]
    columns = ColumnPermutation(covered, left, group)
    # buffers for a chunk of permuted rows: neither matrix is permuted as a whole
    width = 0 if covered is None else covered.shape[0] * group
    room = [left.new_empty(step, width) for _ in range(2)]
    for rows in row_chunks(left.shape[0], step):
        size = rows.stop - rows.start
        total.add(*(columns.gather_into(to[:size], of[rows]) for to, of in zip(room, (left, right), strict=True)))
    return total.result()


def block_products(left: Tensor, right: Tensor, blocks: int, block_size: int) -> Tensor:
    """Return the diagonal blocks of ``left.T @ right``: ``(N, d), (N, d) -> (blocks, block_size, block_size)``.

    Measured on the CPU, 256 to 4096 rows and columns: for one block a plain product is the fastest, for many blocks a
    batched product. In 16 bits a copy that makes each block contiguous pays, up to four times where rows are few.
    """
    left_blocks, right_blocks = _by_block(left, blocks, block_size), _by_block(right, blocks, block_size)
    if left.device.type != "cpu" or left.element_size() >= 4:
        return torch.bmm(left_blocks.mT, right_blocks)
    if blocks == 1:
        return torch.mm(left_blocks[0].mT, right_blocks[0])[None]
    total: Tensor | None = None
    for rows in row_chunks(left.shape[0], chunk_rows(left)):
        part = torch.bmm(left_blocks[:, rows].contiguous().mT, right_blocks[:, rows].contiguous())
        total = _summed(total, part)
    return left.new_zeros(blocks, block_size, block_size) if total is None else total.to(left.dtype)


def add_block_products(x: Tensor, displacement: Tensor, out: Tensor | None = None) -> Tensor:
    """Return ``x + x @ Diag(D)`` for ``x (N, d)``; columns past the last block pass unchanged.

    Args:
        x: Matrix with contiguous rows.
        displacement: ``(n, b, b)``.
        out: Where to write, no memory shared with ``x``; None for a new tensor.
    """
    blocks, block_size = displacement.shape[0], displacement.shape[-1]
    out = x.clone(memory_format=torch.contiguous_format) if out is None else out.copy_(x)
    # Both routes write to the result: the products accumulate and add in fp32 and round once. Measured on the CPU, one
    # product a block is faster from b = 64 in fp32 and from b = 128 in 16 bits.
    if x.device.type != "cpu" or block_size <= (32 if x.element_size() >= 4 else 64):
        _by_block(out, blocks, block_size).baddbmm_(_by_block(x, blocks, block_size), displacement)
    else:
        # columns past the last block are parts without a displacement
        for part, of, d in zip(out.split(block_size, 1), x.split(block_size, 1), displacement, strict=False):
            part.addmm_(of, d)
    return out


def _summed(total: Tensor | None, part: Tensor) -> Tensor:
    """Return the sum in fp32 or wider, as within one product; the first part is returned unchanged."""
    return part if total is None else total.to(torch.promote_types(total.dtype, torch.float32)).add_(part)


def _by_block(x: Tensor, blocks: int, block_size: int) -> Tensor:
    """View ``(N, d)`` as ``(blocks, N, block_size)``."""
    covered = blocks * block_size
    columns = x if x.shape[1] == covered else x[:, :covered]
    return columns.view(x.shape[0], blocks, block_size).transpose(0, 1)


def _buffer(matrix: Tensor, rows: int, permutation: Tensor | None) -> Tensor:
    """Return a buffer for permuted rows of ``matrix``, without rows where there is no permutation."""
    return matrix.new_empty(0 if permutation is None else rows, matrix.shape[1])
