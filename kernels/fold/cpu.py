"""Folding two block rotations into a weight, in PyTorch for the CPU; README.md derives the gradients."""

from collections.abc import Iterator

import torch
from torch import Tensor

from orthotrain.kernels.block_batches import chunk_rows
from orthotrain.kernels.block_rotate.cpu import BlockSum, add_block_products
from orthotrain.kernels.permutations import ColumnPermutation, RowPermutation


def fold_forward(
    weight: Tensor,
    d_out: Tensor | None,
    d_in: Tensor | None,
    permutation_out: Tensor | None,
    permutation_in: Tensor | None,
) -> Tensor:
    """Return ``R_out^T W R_in^T`` with its rows scattered by ``permutation_out`` and its columns by ``permutation_in``.

    Args:
        weight: ``(out, in)`` in the frame of the rotations.
        d_out: Displacements of the output side ``(n, b, b)``, None for no rotation.
        d_in: Displacements of the input side ``(m, c, c)``, None for no rotation.
        permutation_out: ``(out / g,)`` (:mod:`permutations`): row i goes to row ``permutation_out[i]`` of the result.
            None keeps the frame.
        permutation_in: ``(in / g,)``, the same for the columns.

    Returns:
        A new tensor ``(out, in)``.
    """
    weight = weight.contiguous()
    out, transposed = torch.empty_like(weight), None if d_in is None else d_in.mT.contiguous()
    direct = permutation_out is None and permutation_in is None
    rows, columns = RowPermutation(permutation_out, weight.shape[0]), ColumnPermutation(permutation_in, weight)
    if direct and d_out is None and d_in is None:
        return out.copy_(weight)
    for part, blocks in block_chunks(weight, d_out):
        # a side that is not rotated costs no pass, and the last pass writes to the result itself
        folded, last = weight[part], out[part] if direct else None
        if transposed is not None:
            folded = add_block_products(folded, transposed, last if d_out is None else None)
        if d_out is not None:
            folded = rotate_rows(folded, d_out[blocks], last)
        if permutation_in is not None:
            target = out[part] if permutation_out is None else torch.empty_like(folded)
            columns.scatter_into(target, folded)
            folded = target
        if permutation_out is not None:
            rows.scatter_into(out, part, folded)
    return out


def fold_backward(
    grad: Tensor,
    weight: Tensor,
    d_out: Tensor | None,
    d_in: Tensor | None,
    permutation_out: Tensor | None,
    permutation_in: Tensor | None,
    need_out: bool = True,
    need_in: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of :func:`fold_forward` for ``d_out`` and ``d_in`` if needed.

    Only the diagonal blocks of the products are formed.
    """
    weight, grad = weight.contiguous(), grad.contiguous()
    grad_out = torch.empty_like(d_out) if d_out is not None and need_out else None
    total = BlockSum(d_in) if d_in is not None and need_in else None
    transposed = None if d_in is None else d_in.mT.contiguous()
    rows, columns = RowPermutation(permutation_out, weight.shape[0]), ColumnPermutation(permutation_in, weight)
    for part, blocks in block_chunks(weight, d_out):
        grad_part = columns.gather_into(torch.empty_like(weight[part]), rows.gather(grad, part))
        half_folded = None
        if d_out is not None and grad_out is not None:
            half_folded = weight[part] if transposed is None else add_block_products(weight[part], transposed)
            left, right = (_row_blocks(matrix, d_out[blocks]) for matrix in (half_folded, grad_part))
            grad_out[blocks] = torch.bmm(left, right.mT)
        if total is not None:
            total.add(
                grad_part, weight[part] if d_out is None else rotate_rows(weight[part], d_out[blocks], half_folded)
            )
    return grad_out, None if total is None else total.result()


def rotate_rows(weight: Tensor, d_out: Tensor, out: Tensor | None = None) -> Tensor:
    """Return ``R_out^T W``, written to ``out`` if given: row blocks are contiguous, so one batched product does it."""
    out = torch.empty_like(weight) if out is None else out
    blocks = _row_blocks(weight, d_out)
    torch.baddbmm(blocks, d_out.mT, blocks, out=_row_blocks(out, d_out))
    covered = d_out.shape[0] * d_out.shape[-1]
    if covered < weight.shape[0]:
        out[covered:] = weight[covered:]
    return out


def block_chunks(weight: Tensor, d_out: Tensor | None) -> Iterator[tuple[slice, slice]]:
    """Yield ranges of rows of the weight with the whole blocks that lie in them; rows past the last block come last."""
    blocks, block_size = (0, 1) if d_out is None else d_out.shape[:2]
    count = max(1, chunk_rows(weight) // block_size)
    for first in range(0, blocks, count):
        last = min(first + count, blocks)
        yield slice(first * block_size, last * block_size), slice(first, last)
    rest = blocks * block_size
    for start in range(rest, weight.shape[0], count * block_size):
        yield slice(start, min(start + count * block_size, weight.shape[0])), slice(blocks, blocks)


def _row_blocks(matrix: Tensor, displacement: Tensor) -> Tensor:
    n, b = displacement.shape[0], displacement.shape[-1]
    return matrix[: n * b].view(n, b, matrix.shape[1])
