"""Unpacking of quantized weights as Triton kernels: one pass, every value formed in fp32 and rounded once."""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from orthotrain.kernels.dequant.cpu import NF4_LEVELS

SIZE = 2048
"""Values that a program unpacks."""

EXACT = (("enable_fp_fusion", False),)
"""Without fused multiply-adds the nested scales are rounded as bitsandbytes rounds them."""


@triton.jit
def _int8_kernel(codes, scales, out, size, GROUP: tl.constexpr, SIZE: tl.constexpr):
    position = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    mask = position < size
    scale = tl.load(scales + position // GROUP, mask=mask, other=0.0)
    value = tl.load(codes + position, mask=mask, other=0).to(tl.float32) * scale
    tl.store(out + position, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _nf4_kernel(packed, absmax, nested, offset, code, levels, out, size, GROUP: tl.constexpr, SIZE: tl.constexpr):
    # A byte holds two values and a group is even, so that both have one scale. A nested group is 256.
    position = tl.program_id(0).to(tl.int64) * (SIZE // 2) + tl.arange(0, SIZE // 2)
    mask = position < size
    group = position // (GROUP // 2)
    scale = tl.load(absmax + group, mask=mask, other=0)
    if nested is not None:
        scale = tl.load(code + scale.to(tl.int32)) * tl.load(nested + group // 256, mask=mask, other=0.0)
        scale += tl.load(offset)
    byte = tl.load(packed + position, mask=mask, other=0).to(tl.int32)
    high = tl.load(levels + (byte >> 4)) * scale
    low = tl.load(levels + (byte & 15)) * scale
    position = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    tl.store(out + position, tl.interleave(high, low).to(out.dtype.element_ty), mask=position // 2 < size)


def dequant_int8_forward(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``codes * scales``; ``cpu.py`` has the shapes."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    if out.numel():
        group_size = codes.shape[1] // scales.shape[1]
        grid = (triton.cdiv(out.numel(), SIZE),)
        _int8_kernel[grid](codes.contiguous(), scales.contiguous(), out, out.numel(), GROUP=group_size, SIZE=SIZE)
    return out


def dequant_nf4_forward(
    packed: Tensor, absmax: Tensor, nested: Sequence[Tensor], group_size: int, dtype: torch.dtype
) -> Tensor:
    """Return ``W (out, in)`` from NF4 bytes; ``cpu.py`` has the shapes."""
    out = torch.empty((packed.shape[0], 2 * packed.shape[1]), dtype=dtype, device=packed.device)
    if out.numel():
        _nf4_kernel[(triton.cdiv(out.numel(), SIZE),)](
            *(packed.contiguous(), absmax.contiguous(), *(nested or (None, None, None))),
            *(_levels(packed.device), out, packed.numel()),
            GROUP=group_size,
            SIZE=SIZE,
            **dict(EXACT),
        )
    return out


@functools.cache
def _levels(device: torch.device) -> Tensor:
    return torch.tensor(NF4_LEVELS, dtype=torch.float32, device=device)
