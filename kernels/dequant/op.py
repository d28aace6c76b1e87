"""The public ``dequant_int8`` and ``dequant_nf4``; quantized weights have no gradient."""

from collections.abc import Sequence

import torch
from torch import Tensor

from orthotrain.kernels.checks import check_dtype, check_tensor
from orthotrain.kernels.dequant.cpu import NESTED_GROUP
from orthotrain.kernels.operation import operation


def _fake_int8(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


def _fake_nf4(packed: Tensor, absmax: Tensor, nested: Sequence[Tensor], group_size: int, dtype: torch.dtype) -> Tensor:
    return packed.new_empty((packed.shape[0], 2 * packed.shape[1]), dtype=dtype)


_dequant_int8 = operation("dequant_int8", folder="dequant", fake=_fake_int8, computes_in="dtype")
_dequant_nf4 = operation("dequant_nf4", folder="dequant", fake=_fake_nf4, computes_in="dtype")


def dequant_int8(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Unpack 8-bit integers with one scale for every group of a row: ``W = codes * scales``.

    Args:
        codes: ``(out, in)`` int8.
        scales: ``(out, groups)`` fp32; ``groups`` divides ``in``.
        dtype: Floating dtype of the result; products are formed in fp32 and rounded once.

    Returns:
        A new ``W (out, in)``.

    Raises:
        ValueError: If dtypes, shapes or devices do not go together.
    """
    check_dtype("dequant_int8", "dtype", dtype)
    check_tensor("dequant_int8", "codes", codes, (None, None), torch.int8, codes.device)
    check_tensor("dequant_int8", "scales", scales, (codes.shape[0], None), torch.float32, codes.device)
    if codes.shape[1] % max(scales.shape[1], 1) or (codes.numel() and not scales.numel()):
        raise ValueError(
            f"dequant_int8: codes {tuple(codes.shape)} and scales {tuple(scales.shape)} do not go together: "
            "takes (out, in) and (out, groups), groups a divisor of in"
        )
    return _dequant_int8(codes, scales, dtype)


def dequant_nf4(
    packed: Tensor, absmax: Tensor, nested: Sequence[Tensor], group_size: int, dtype: torch.dtype
) -> Tensor:
    """Unpack 4-bit NormalFloat as bitsandbytes stores it (arXiv:2305.14314, section 3).

    Value ``i`` is a level of NF4 times the scale of group ``i // group_size``, counted in memory order. Double
    quantization stores scale ``j`` as a byte: ``code[absmax[j]] * factors[j // 256] + offset``.

    Args:
        packed: ``(out, in / 2)`` uint8, the first of two values in the upper half of a byte.
        absmax: Scales ``(groups,)``, fp32, or uint8 under double quantization.
        nested: Under double quantization ``factors (ceil(groups / 256),)``, ``offset (1,)`` and ``code (256,)``, the
            levels of the scales, all fp32; else empty.
        group_size: Values that share a scale; even.
        dtype: Floating dtype of the result; values are formed in fp32 and rounded once.

    Returns:
        A new ``W (out, in)``.

    Raises:
        ValueError: If dtypes or shapes do not go together.
    """
    check_dtype("dequant_nf4", "dtype", dtype)
    check_tensor("dequant_nf4", "packed", packed, (None, None), torch.uint8, packed.device)
    if group_size < 2 or group_size % 2:
        raise ValueError(f"dequant_nf4: group_size={group_size}: two values share a byte, take an even number")
    if len(nested) not in (0, 3):
        raise ValueError("dequant_nf4: double quantization takes factors, offset and code, or none of the three")
    groups = -(-2 * packed.numel() // group_size)
    scales = torch.uint8 if nested else torch.float32
    check_tensor("dequant_nf4", "absmax", absmax, (groups,), scales, packed.device)
    sizes = {"factors": -(-groups // NESTED_GROUP), "offset": 1, "code": 256}
    for (name, size), tensor in zip(sizes.items(), nested, strict=False):
        check_tensor("dequant_nf4", name, tensor, (size,), torch.float32, packed.device)
    return _dequant_nf4(packed, absmax, nested, group_size, dtype)
