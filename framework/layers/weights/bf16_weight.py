"""A frozen weight in bf16, 2 bytes a value, or with a third byte for the rounding error."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from orthotrain.layers.weights.frozen_weight import check_storable
from orthotrain.layers.weights.quantized_product import storage_format
from orthotrain.layers.weights.quantized_weight import QuantizedWeight
from orthotrain.layers.weights.rounding import Noise, in_parts, round_steps, stochastic_round

RESIDUAL_STEPS = 256


class Bf16Weight(QuantizedWeight):
    """A bf16 ``W (out, in)``, whatever the dtype of the network, with or without a residual of one byte a value.

    Without a residual a merge rounds stochastically to bf16: relative steps of 2^-8, unbiased. The residual counts in
    units of 1/256 of the last place of bf16, so a merge rounds to steps of 2^-16. Products in 16 bits read only the
    bf16 values; merges and products in fp32 read the sum of both.

    Args:
        weight: ``(out, in)``, any floating dtype.
        residual: Whether to keep the residual.
    """

    format: ClassVar[str] = "bf16"
    values: nn.Parameter

    def __init__(self, weight: Tensor, *, residual: bool = False) -> None:
        check_storable(weight)
        self.carries_residual = residual
        # merges write into the stored tensor, which must not be the caller's
        stored = pack_bf16(weight.clone() if weight.dtype == torch.bfloat16 else weight, residual)
        super().__init__(weight.shape, 1, weight.dtype, stored)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return ``W (out, in)`` in ``dtype``, None for ``compute_dtype``: in bf16 the stored values themselves."""
        dtype = dtype or self.compute_dtype
        return self.values if dtype == torch.bfloat16 else super().dequantize(dtype)

    def quantize(self, weight: Tensor, noise: Noise | None = None) -> dict[str, Tensor]:
        """Return the stored tensors of ``weight (out, in)``; with noise rounded stochastically, unbiased."""
        return pack_bf16(weight, self.carries_residual, noise)


def last_place(values: Tensor) -> Tensor:
    """Return the spacing of bf16 at bf16 ``values``, fp32: 2^(e - 7) for numbers of [2^e, 2^(e+1))."""
    exponent = values.float().abs().view(torch.int32) >> 23
    # smaller numbers than 2^-119 get the spacing of 2^-119, so that the spacing is never subnormal
    return ((exponent - 7).clamp_min(1) << 23).view(torch.float32)


def pack_bf16(weight: Tensor, residual: bool, noise: Noise | None = None) -> dict[str, Tensor]:
    """Split ``weight (out, in)`` into bf16 values and, if asked for, an int8 residual in 1/256 of their last place.

    With noise the last rounding is stochastic: the rounding of the residual if there is a residual, else of the values.
    Without noise it is to nearest.

    Returns:
        ``values`` and ``residual``, both ``(out, in)``. Half a last place is 128 steps, one more than int8 holds, and
        becomes 127.
    """
    return in_parts(lambda rows, rest: _pack_rows(weight.detach()[rows], residual, rest), weight, noise)


def _pack_rows(weight: Tensor, residual: bool, noise: Noise | None) -> dict[str, Tensor]:
    weight = weight.float()
    if not residual:
        return {"values": weight.to(torch.bfloat16) if noise is None else stochastic_round(weight, noise)}
    values = weight.to(torch.bfloat16)
    steps = (weight - values.float()) / (last_place(values) / RESIDUAL_STEPS)
    return {"values": values, "residual": round_steps(steps, noise).clamp_(-128, 127).to(torch.int8)}


@storage_format("bf16")
def unpack_bf16(stored: list[Tensor], group_size: int, dtype: torch.dtype) -> Tensor:
    """Return ``W (out, in)`` from the tensors of :func:`pack_bf16`; a result in 16 bits leaves out the residual."""
    values, *residual = stored
    if not residual or dtype.itemsize < 4:
        return values.to(dtype)
    return (values.float() + residual[0] * (last_place(values) / RESIDUAL_STEPS)).to(dtype)
