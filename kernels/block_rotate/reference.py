"""Block rotation of the last axis, in plain PyTorch. The derivation is in README.md beside this file."""

import torch
from torch import Tensor

from orthotrain.kernels.permute import gather_columns, scatter_columns


def block_rotate_forward(x: Tensor, displacement: Tensor, load: Tensor | None, store: Tensor | None) -> Tensor:
    """Rotate blocks of the last axis: ``z = x[..., load]``, ``z_k += z_k @ D_k``, ``y[..., store] = z``.

    Args:
        x: Input ``(..., d)``.
        displacement: ``D = R - I``, ``(n, b, b)`` with ``n * b <= d``, dtype of ``x``. Coordinates past ``n * b`` pass.
        load: Permutation ``(d,)`` applied while reading, or None.
        store: Permutation ``(d,)`` applied while writing, or None.

    Returns:
        A new tensor ``(..., d)``.
    """
    source = gather_columns(x.reshape(-1, x.shape[-1]), load)
    rotated = add_block_products(source, displacement)
    return scatter_columns(rotated, store).view(x.shape)


def block_rotate_backward(
    grad: Tensor, x: Tensor, displacement: Tensor, load: Tensor | None, store: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`block_rotate_forward` for ``x`` ``(..., d)`` and ``displacement`` ``(n, b, b)``."""
    width = x.shape[-1]
    source = gather_columns(x.reshape(-1, width), load)
    grad_rotated = gather_columns(grad.reshape(-1, width), store)
    grad_displacement = block_products(source, grad_rotated, displacement.shape[0], displacement.shape[-1])
    grad_source = add_block_products(grad_rotated, displacement.mT)
    return scatter_columns(grad_source, load).view(x.shape), grad_displacement


def block_products(left: Tensor, right: Tensor, blocks: int, block_size: int) -> Tensor:
    """Diagonal blocks of ``left.T @ right``: ``(N, d), (N, d) -> (blocks, block_size, block_size)``."""
    out = left.new_empty(blocks, block_size, block_size)
    for k, columns in enumerate(column_slices(blocks, block_size)):
        torch.mm(left[:, columns].mT, right[:, columns], out=out[k])
    return out


def add_block_products(x: Tensor, displacement: Tensor) -> Tensor:
    """Return ``x + x @ Diag(D)`` for contiguous ``x (N, d)``; columns past the last block pass unchanged."""
    # addmm accumulates and adds in fp32 and rounds once; one product a block on column
    # slices needs no transposed copy of the activations.
    blocks, block_size = displacement.shape[0], displacement.shape[-1]
    out = torch.empty_like(x)
    for k, columns in enumerate(column_slices(blocks, block_size)):
        torch.addmm(x[:, columns], x[:, columns], displacement[k], out=out[:, columns])
    rest = blocks * block_size
    if rest < x.shape[-1]:
        out[:, rest:] = x[:, rest:]
    return out


def column_slices(blocks: int, block_size: int) -> list[slice]:
    """Return the column range of each block."""
    return [slice(k * block_size, (k + 1) * block_size) for k in range(blocks)]
