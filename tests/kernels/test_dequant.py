"""The plain unpacking against bitsandbytes and the formats that the layers store, to the last bit."""

import pytest
import torch

from orthotrain.kernels.dequant import dequant_int8, dequant_nf4, naive
from orthotrain.layers.weights import nf4_and_int8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(("shape", "group_size"), [((16, 64), 64), ((7, 96), 64), ((5, 66), 32), ((300, 128), 64)])
def test_nf4_equals_bitsandbytes(shape, group_size, double, dtype):
    stored = list(nf4_and_int8.pack_nf4(torch.randn(shape), group_size, double).values())
    packed, absmax, *nested = stored
    statistics = (*nested, nf4_and_int8._dynamic_code(packed.device)) if double else ()
    found = dequant_nf4(packed, absmax, statistics, group_size=group_size, dtype=dtype)
    assert torch.equal(found, nf4_and_int8.unpack_nf4(stored, group_size, dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_int8_is_the_rounded_product(dtype):
    codes, scales = nf4_and_int8.pack_int8(torch.randn(6, 32), 8).values()
    exact = codes.double() * scales.double().repeat_interleave(8, dim=1)
    found = dequant_int8(codes, scales, dtype)
    assert torch.equal(found, exact.float().to(dtype)) and torch.equal(found, naive.dequant_int8(codes, scales, dtype))


@pytest.mark.parametrize("double", [True, False])
def test_nf4_equals_its_definition(double):
    packed, absmax, *nested = nf4_and_int8.pack_nf4(torch.randn(5, 66), 32, double).values()
    statistics = (*nested, nf4_and_int8._dynamic_code(packed.device)) if double else ()
    arguments = (packed, absmax, statistics, 32, torch.bfloat16)
    assert torch.equal(dequant_nf4(*arguments), naive.dequant_nf4(*arguments))


def test_opcheck():
    codes, scales = nf4_and_int8.pack_int8(torch.randn(6, 32), 8).values()
    torch.library.opcheck(torch.ops.orthotrain_v2.dequant_int8.default, (codes, scales, torch.float32))
    packed, absmax, *nested = nf4_and_int8.pack_nf4(torch.randn(6, 64), 64, True).values()
    arguments = (packed, absmax, [*nested, nf4_and_int8._dynamic_code(packed.device)], 64, torch.bfloat16)
    torch.library.opcheck(torch.ops.orthotrain_v2.dequant_nf4.default, arguments)


def test_bad_input_names_what_is_wrong():
    codes, scales = torch.zeros(2, 6, dtype=torch.int8), torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"codes \(2, 6\).*scales \(2, 4\)"):
        dequant_int8(codes, scales, torch.float32)
    with pytest.raises(ValueError, match=r"codes is torch.float32 \(2, 6\) .*; takes torch.int8 \(any, any\)"):
        dequant_int8(codes.float(), scales, torch.float32)
    with pytest.raises(ValueError, match="scales is .* on meta; takes .* on cpu"):
        dequant_int8(codes, torch.zeros(2, 3, device="meta"), torch.float32)
    with pytest.raises(ValueError, match="dtype is torch.int32; takes float16, bfloat16, float32, float64"):
        dequant_int8(codes, torch.zeros(2, 3), torch.int32)


PACKED, CODE = torch.zeros(2, 32, dtype=torch.uint8), torch.zeros(256)
BYTES = torch.zeros(2, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("statistics", "group_size", "message"),
    [
        ((torch.zeros(3), ()), 64, r"absmax is torch.float32 \(3,\) .*; takes torch.float32 \(2,\)"),
        ((torch.zeros(2), ()), 63, "group_size=63: .* take an even number"),
        ((torch.zeros(2), (torch.zeros(1),)), 64, "double quantization takes .* or none of the three"),
        ((torch.zeros(2), (torch.zeros(1), torch.zeros(1), CODE)), 64, r"absmax .*; takes torch.uint8 \(2,\)"),
        ((BYTES, (torch.zeros(2), torch.zeros(1), CODE)), 64, r"factors is torch.float32 \(2,\) .*\(1,\)"),
        ((BYTES, (torch.zeros(1), torch.zeros(()), CODE)), 64, r"offset is torch.float32 \(\) .*\(1,\)"),
        ((BYTES, (torch.zeros(1), torch.zeros(1), CODE[1:])), 64, r"code is torch.float32 \(255,\) .*\(256,\)"),
        ((BYTES, (torch.zeros(1), torch.zeros(1), CODE.to("meta"))), 64, "code is .* on meta; takes .* on cpu"),
        ((torch.zeros(2, device="meta"), ()), 64, "absmax is .* on meta; takes .* on cpu"),
    ],
)
def test_nf4_names_the_statistic_that_does_not_fit(statistics, group_size, message):
    with pytest.raises(ValueError, match=f"dequant_nf4: {message}"):
        dequant_nf4(PACKED, *statistics, group_size=group_size, dtype=torch.float32)
