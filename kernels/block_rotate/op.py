"""``orthotrain::block_rotate`` as a torch custom op: eager, autograd and torch.compile see one opaque call."""

from typing import Any

import torch
from torch import Tensor

from orthotrain.kernels.block_rotate import reference


@torch.library.custom_op("orthotrain::block_rotate", mutates_args=())
def _block_rotate(x: Tensor, displacement: Tensor, load: Tensor | None, store: Tensor | None) -> Tensor:
    return reference.block_rotate_forward(x, displacement, load, store)


@_block_rotate.register_fake
def _(x: Tensor, displacement: Tensor, load: Tensor | None, store: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("orthotrain::block_rotate_backward", mutates_args=())
def _block_rotate_backward(
    grad: Tensor, x: Tensor, displacement: Tensor, load: Tensor | None, store: Tensor | None
) -> tuple[Tensor, Tensor]:
    return reference.block_rotate_backward(grad, x, displacement, load, store)


@_block_rotate_backward.register_fake
def _(
    grad: Tensor, x: Tensor, displacement: Tensor, load: Tensor | None, store: Tensor | None
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), displacement.new_empty(displacement.shape)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
    grad_x, grad_displacement = _block_rotate_backward(grad, *ctx.saved_tensors)
    return grad_x, grad_displacement, None, None


_block_rotate.register_autograd(_backward, setup_context=_setup_context)


def block_rotate(x: Tensor, displacement: Tensor, load: Tensor | None = None, store: Tensor | None = None) -> Tensor:
    """Rotate the last axis of ``x`` block by block: ``z = x[..., load]``, ``z_k += z_k @ D_k``, ``y[..., store] = z``.

    A rotation in the frame of a permutation ``p`` is ``load=p, store=p``; a layer that keeps its weight in the
    permuted frame needs only ``load`` on its input side and ``store`` on its output side.

    Args:
        x: Activations ``(..., d)``.
        displacement: ``D = R - I`` of ``n`` blocks, ``(n, b, b)``, ``n * b <= d``; same dtype and device as ``x``.
            The last ``d - n * b`` coordinates pass unchanged.
        load: Permutation ``(d,)``, int64, or None for the identity.
        store: Permutation ``(d,)``, int64, or None for the identity.

    Returns:
        ``(..., d)`` in the dtype of ``x``; the sum ``x + x D`` is accumulated in fp32 for 16-bit inputs.

    Raises:
        ValueError: If dtypes differ, the blocks are not square or they do not fit in ``d``.
    """
    if displacement.dtype != x.dtype:
        raise ValueError(f"block_rotate: displacement is {displacement.dtype} and x is {x.dtype}; cast one of them")
    blocks, rows, block_size = displacement.shape
    if rows != block_size or blocks * block_size > x.shape[-1]:
        raise ValueError(f"block_rotate: {blocks} blocks of {rows} x {block_size} do not fit in {x.shape[-1]} columns")
    return _block_rotate(x, displacement, load, store)
