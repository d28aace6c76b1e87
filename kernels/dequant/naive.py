"""The definition of the two unpackings, value by value."""

from collections.abc import Sequence

import torch
from torch import Tensor

from orthotrain.kernels.dequant.cpu import NESTED_GROUP, NF4_LEVELS


def dequant_int8(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``W (out, in)`` with ``W[r, c] = codes[r, c] * scales[r, c // group]``."""
    group = codes.shape[1] // scales.shape[1]
    return (codes * scales.repeat_interleave(group, dim=1)).to(dtype)


def dequant_nf4(
    packed: Tensor, absmax: Tensor, nested: Sequence[Tensor], group_size: int, dtype: torch.dtype
) -> Tensor:
    """Return ``W (out, in)``: a level of NF4 for each half of a byte, times the scale of its group in memory order."""
    scales = absmax
    if nested:
        factors, offset, code = nested
        scales = torch.stack([code[int(byte)] * factors[j // NESTED_GROUP] for j, byte in enumerate(absmax)]) + offset
    halves = [half for byte in packed.flatten().tolist() for half in (byte >> 4, byte & 15)]
    values = [NF4_LEVELS[half] * scales[i // group_size] for i, half in enumerate(halves)]
    return torch.stack(values).view(packed.shape[0], -1).to(dtype)
