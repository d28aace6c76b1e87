"""The definition of ``block_rotate``, with a full matrix."""

import torch
from torch import Tensor

from orthotrain.kernels.permutations import by_feature


def block_rotate(
    x: Tensor, displacement: Tensor, gather: Tensor | None = None, scatter: Tensor | None = None
) -> Tensor:
    """Return ``y`` with ``y[..., scatter] = x[..., gather] R`` for ``x (..., d)`` and ``R = I + Diag(D_1 .. D_n)``."""
    width = x.shape[-1]
    y = x if gather is None else x[..., by_feature(gather, width)]
    y = y @ rotation(displacement, width)
    return y if scatter is None else y[..., torch.argsort(by_feature(scatter, width))]


def rotation(displacement: Tensor | None, width: int) -> Tensor:
    """Return ``R (width, width)`` of blocks ``D (n, b, b)``; the coordinates past the last block pass."""
    if displacement is None or not displacement.shape[0]:
        return torch.eye(width, dtype=None if displacement is None else displacement.dtype)
    blocks = torch.block_diag(*displacement)
    rest = width - blocks.shape[0]
    return torch.eye(width, dtype=blocks.dtype) + torch.nn.functional.pad(blocks, (0, rest, 0, rest))
