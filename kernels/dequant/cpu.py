"""Unpacking of quantized weights in PyTorch for the CPU: every value is formed in fp32 and rounded once."""

from collections.abc import Sequence

import torch
from torch import Tensor

NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The 16 values of 4-bit NormalFloat, exactly representable in fp32 (arXiv:2305.14314, appendix E)."""

NESTED_GROUP = 256
"""Scales that share one scale of their own under double quantization."""


def dequant_int8_forward(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``codes * scales`` ``(out, in)`` from int8 codes ``(out, in)`` and fp32 scales ``(out, groups)``."""
    weight = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    groups = (scales.shape[1], codes.shape[1] // scales.shape[1])
    torch.mul(codes.unflatten(1, groups), scales.unsqueeze(-1), out=weight.unflatten(1, groups))
    return weight


def dequant_nf4_forward(
    packed: Tensor, absmax: Tensor, nested: Sequence[Tensor], group_size: int, dtype: torch.dtype
) -> Tensor:
    """Return ``W (out, in)`` from NF4 bytes ``(out, in / 2)``; see ``dequant_nf4`` for the other arguments."""
    values = torch.stack((packed >> 4, packed & 15), dim=-1).view(-1).int()
    scales = absmax
    if nested:
        factors, offset, code = nested
        scales = code[absmax.int()] * factors.repeat_interleave(NESTED_GROUP)[: absmax.numel()] + offset
    # Groups run on from row to row, and the last one may be cut off.
    scales = scales.repeat_interleave(group_size)[: values.numel()]
    weight = torch.tensor(NF4_LEVELS, device=packed.device)[values] * scales
    return weight.view(packed.shape[0], 2 * packed.shape[1]).to(dtype)
