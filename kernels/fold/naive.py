"""The definition of ``fold``, with full matrices."""

import torch
from torch import Tensor

from orthotrain.kernels.block_rotate.naive import rotation
from orthotrain.kernels.permutations import by_feature


def fold(
    weight: Tensor,
    d_out: Tensor | None,
    d_in: Tensor | None,
    permutation_out: Tensor | None = None,
    permutation_in: Tensor | None = None,
) -> Tensor:
    """Return ``W_eff (out, in)`` with ``W_eff[permutation_out][:, permutation_in] = R_out^T W R_in^T``."""
    height, width = weight.shape
    folded = rotation(d_out, height).to(weight.dtype).T @ weight @ rotation(d_in, width).to(weight.dtype).T
    if permutation_out is not None:
        folded = folded[torch.argsort(by_feature(permutation_out, height))]
    return folded if permutation_in is None else folded[:, torch.argsort(by_feature(permutation_in, width))]
