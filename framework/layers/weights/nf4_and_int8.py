"""Packing and unpacking of the quantized formats: NF4 by bitsandbytes, int8 in plain torch.

bitsandbytes takes seconds to import, so it is imported in the functions that need it.
"""

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from orthotrain.errors import ConfigurationError
from orthotrain.kernels.dequant import dequant_int8, dequant_nf4
from orthotrain.kernels.dequant.cpu import NESTED_GROUP
from orthotrain.kernels.dispatch import backend_for
from orthotrain.layers.weights.quantized_product import storage_format
from orthotrain.layers.weights.rounding import LEVELS, Noise, in_parts, round_steps

NF4_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def pack_nf4(
    weight: Tensor, group_size: int, double_quantization: bool, noise: Noise | None = None
) -> dict[str, Tensor]:
    """Quantize ``weight (out, in)`` to NF4, to nearest; with noise rounded stochastically.

    Returns:
        ``packed (out, in / 2)`` uint8 and ``absmax (groups,)``: fp32, or with double quantization uint8 beside
        ``nested_absmax (groups / 256,)`` and ``nested_offset (1,)``, both fp32.

    Raises:
        ConfigurationError: For a dtype or an odd width that NF4 cannot take.
    """
    from bitsandbytes.functional import quantize_4bit, quantize_blockwise

    if weight.dtype not in NF4_DTYPES:
        raise ConfigurationError(f"NF4 takes a float32, bfloat16 or float16 weight, not {_name(weight.dtype)}")
    if weight.shape[1] % 2:
        raise ConfigurationError(
            f"NF4 packs two values a byte, and a weight with {weight.shape[1]} inputs is odd: take another "
            "storage for the layer (overrides), or add the layer to exclude"
        )
    weight, columns = weight.detach(), weight.shape[1]

    def to_nearest(rows: slice, _: Noise | None) -> dict[str, Tensor]:
        packed, state = quantize_4bit(weight[rows].contiguous(), blocksize=group_size, quant_type="nf4")
        return {"packed": packed.view(-1, columns // 2), "absmax": state.absmax}

    together = group_size // math.gcd(group_size, columns)  # rows that whole groups of values fill
    stored = in_parts(to_nearest, weight, None, together)
    if double_quantization:
        # These are the steps of quantize_4bit(compress_statistics=True), which would cache the code on the device of
        # the first caller: after a meta tensor every later call would fail.
        absmax, code = stored["absmax"], _dynamic_code(weight.device)
        offset = absmax.mean()
        stored["absmax"], nested = quantize_blockwise(absmax - offset, code=code, blocksize=NESTED_GROUP)
        stored |= {"nested_absmax": nested.absmax, "nested_offset": offset.view(1)}
    if noise is not None:
        scales = _absmax([*stored.values()][1:])

        def rounded(rows: slice, rest: Noise | None) -> dict[str, Tensor]:
            assert rest is not None
            return {"packed": _round_nf4(weight[rows], scales[rows.start * columns // group_size :], group_size, rest)}

        stored |= in_parts(rounded, weight, noise, together)
    return stored


def _round_nf4(weight: Tensor, absmax: Tensor, group_size: int, noise: Noise) -> Tensor:
    """Return ``packed (out, in / 2)`` of ``weight (out, in)``, each value one of the two levels around it, unbiased."""
    from bitsandbytes.functional import get_4bit_type

    levels = get_4bit_type("nf4", device=weight.device)
    scales = absmax[: -(-weight.numel() // group_size)].repeat_interleave(group_size)[: weight.numel()].view_as(weight)
    relative = (weight.float() / torch.where(scales == 0, 1.0, scales)).clamp(-1, 1)
    upper = torch.bucketize(relative, levels).clamp(1, 15)
    low, high = levels[upper - 1], levels[upper]
    drawn = (noise.draw(weight.shape, weight.device) + 0.5) / LEVELS
    codes = (upper - (drawn * (high - low) >= relative - low).long()).to(torch.uint8)
    return (codes[:, ::2] << 4) | codes[:, 1::2]


@storage_format("nf4")
def unpack_nf4(stored: list[Tensor], group_size: int, dtype: torch.dtype) -> Tensor:
    """Return ``W (out, in)`` from the tensors of :func:`pack_nf4`, in their order."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    packed, *statistics = stored
    if backend_for(packed.new_empty(0, dtype=dtype), "dequant") == "triton":
        absmax, *nested = statistics
        nested = [*nested, _dynamic_code(packed.device)] if nested else []
        return dequant_nf4(packed, absmax, nested, group_size, dtype)
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    # Groups continue from row to row, but the CPU kernel of bitsandbytes starts a new group in every row, an error of
    # up to 40% unless groups divide rows. Where they do not, the matrix is unpacked as one long row.
    shape = torch.Size((rows, columns) if columns % group_size == 0 else (rows * columns,))
    kernel_dtype = dtype if dtype in NF4_DTYPES else torch.float32
    state = QuantState(_absmax(statistics), shape, blocksize=group_size, quant_type="nf4", dtype=kernel_dtype)
    return dequantize_4bit(packed.view(-1, 1), state).reshape(rows, columns).to(dtype)


def quant_state_tensors(packed: Tensor, state: Any) -> dict[str, Tensor]:
    """Return copies of a bitsandbytes 4-bit weight and its ``QuantState``, named as :func:`pack_nf4` names them.

    Raises:
        ConfigurationError: If the weight is not NF4, was repacked for the CPU, or has unknown nested statistics.
    """
    if getattr(state, "packing_format_for_cpu", False):
        raise ConfigurationError(
            "this 4-bit weight was repacked by an evaluation on the CPU, which rounds its scales: wrap it earlier"
        )
    if state.quant_type != "nf4":
        raise ConfigurationError(f"quant_type={state.quant_type!r}: only 'nf4' can be taken over")
    stored = {"packed": packed.detach().view(torch.uint8).reshape(state.shape[0], -1), "absmax": state.absmax}
    if state.nested:
        nested = state.state2
        if nested.blocksize != NESTED_GROUP or not torch.equal(nested.code, _dynamic_code(nested.code.device)):
            raise ConfigurationError("this 4-bit weight has nested statistics that are not those of bitsandbytes")
        stored |= {"nested_absmax": nested.absmax, "nested_offset": state.offset.reshape(1)}
    return {name: tensor.detach().clone() for name, tensor in stored.items()}


def pack_int8(weight: Tensor, group_size: int, noise: Noise | None = None) -> dict[str, Tensor]:
    """Quantize ``weight (out, in)`` to int8, group by group along a row; with noise rounded stochastically.

    Returns:
        ``codes (out, in)`` int8 from -127 to 127 and ``scales (out, in / group_size)`` fp32.

    Raises:
        ConfigurationError: If the weight is not floating point.
    """
    if not weight.is_floating_point():
        raise ConfigurationError(f"int8 quantizes a floating-point weight, not {_name(weight.dtype)}")
    return in_parts(lambda rows, rest: _pack_int8_rows(weight.detach()[rows], group_size, rest), weight, noise)


def _pack_int8_rows(weight: Tensor, group_size: int, noise: Noise | None) -> dict[str, Tensor]:
    groups = weight.float().unflatten(1, (-1, group_size))
    scales = groups.abs().amax(-1) / 127
    steps = groups / torch.where(scales == 0, 1.0, scales).unsqueeze(-1)
    codes = round_steps(steps.flatten(1), noise).clamp_(-127, 127).to(torch.int8)
    return {"codes": codes, "scales": scales}


@storage_format("int8")
def unpack_int8(stored: list[Tensor], group_size: int, dtype: torch.dtype) -> Tensor:
    """Return ``W (out, in)`` from the tensors of :func:`pack_int8`, in their order."""
    codes, scales = stored
    return dequant_int8(codes, scales, dtype)


def _absmax(stored: list[Tensor]) -> Tensor:
    """Return the scales that unpacking will use, ``(groups,)`` fp32, from the tensors after ``packed``."""
    from bitsandbytes.functional import QuantState, dequantize_blockwise

    absmax, *nested = stored
    if not nested:
        return absmax
    code = _dynamic_code(absmax.device)
    state = QuantState(nested[0], blocksize=NESTED_GROUP, code=code, dtype=torch.float32)
    return dequantize_blockwise(absmax, state) + nested[1]


@functools.cache
def _dynamic_code(device: torch.device) -> Tensor:
    from bitsandbytes.functional import create_dynamic_map

    # cached for the process, so the tensor must be real even if a plan computes with fake tensors
    with unset_fake_temporarily(), torch.device("cpu"):
        return create_dynamic_map().to(device)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
