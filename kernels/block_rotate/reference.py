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
    grad_source = add_block_products(grad_rotated, displacement.mT.contiguous())
    return scatter_columns(grad_source, load).view(x.shape), grad_displacement


def block_products(left: Tensor, right: Tensor, blocks: int, block_size: int) -> Tensor:
    """Diagonal blocks of ``left.T @ right``: ``(N, d), (N, d) -> (blocks, block_size, block_size)``."""
    if left.device.type != "cpu" or (left.element_size() >= 4 and block_size <= 64):
        return torch.bmm(_by_block(left, blocks, block_size).mT, _by_block(right, blocks, block_size))
    out = left.new_empty(blocks, block_size, block_size)
    for k, columns in enumerate(column_slices(blocks, block_size)):
        torch.mm(left[:, columns].mT, right[:, columns], out=out[k])
    return out


def add_block_products(x: Tensor, displacement: Tensor) -> Tensor:
    """Return ``x + x @ Diag(D)`` for contiguous ``x (N, d)``; columns past the last block pass unchanged."""
    blocks, block_size = displacement.shape[0], displacement.shape[-1]
    out = torch.empty_like(x)
    # Both routes write into place: the products accumulate and add in fp32 and round once. Measured on CPU, a product a
    # block is the faster one from b = 64 in fp32 and b = 128 in 16 bits.
    if x.device.type != "cpu" or block_size <= (32 if x.element_size() >= 4 else 64):
        source = _by_block(x, blocks, block_size)
        torch.baddbmm(source, source, displacement, out=_by_block(out, blocks, block_size))
    else:
        for k, columns in enumerate(column_slices(blocks, block_size)):
            torch.addmm(x[:, columns], x[:, columns], displacement[k], out=out[:, columns])
    rest = blocks * block_size
    if rest < x.shape[-1]:
        out[:, rest:] = x[:, rest:]
    return out


def column_slices(blocks: int, block_size: int) -> list[slice]:
    """Return the column range of each block."""
    return [slice(k * block_size, (k + 1) * block_size) for k in range(blocks)]


def _by_block(x: Tensor, blocks: int, block_size: int) -> Tensor:
    """View ``(N, d)`` as ``(blocks, N, block_size)``."""
    return x[:, : blocks * block_size].unflatten(1, (blocks, block_size)).transpose(0, 1)
