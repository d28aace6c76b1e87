"""The plain unpacking against bitsandbytes and the formats that the layers store, to the last bit."""

import pytest
import torch

from orthotrain.kernels.dequant import dequant_int8, dequant_nf4
from orthotrain.layers import packing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(("shape", "group_size"), [((16, 64), 64), ((7, 96), 64), ((5, 66), 32), ((300, 128), 64)])
def test_nf4_equals_bitsandbytes(shape, group_size, double, dtype):
    stored = list(packing.pack_nf4(torch.randn(shape), group_size, double).values())
    packed, absmax, *nested = stored
    statistics = (*nested, packing._dynamic_code(packed.device)) if double else (None, None, None)
    found = dequant_nf4(packed, absmax, *statistics, group_size=group_size, dtype=dtype)
    assert torch.equal(found, packing.unpack_nf4(stored, group_size, dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_int8_is_the_rounded_product(dtype):
    codes, scales = packing.pack_int8(torch.randn(6, 32), 8).values()
    exact = codes.double() * scales.double().repeat_interleave(8, dim=1)
    assert torch.equal(dequant_int8(codes, scales, dtype), exact.float().to(dtype))


def test_opcheck():
    codes, scales = packing.pack_int8(torch.randn(6, 32), 8).values()
    torch.library.opcheck(torch.ops.orthotrain.dequant_int8.default, (codes, scales, torch.float32))
    packed, absmax, *nested = packing.pack_nf4(torch.randn(6, 64), 64, True).values()
    arguments = (packed, absmax, *nested, packing._dynamic_code(packed.device), 64, torch.bfloat16)
    torch.library.opcheck(torch.ops.orthotrain.dequant_nf4.default, arguments)


def test_bad_input_names_what_is_wrong():
    codes, scales = torch.zeros(2, 6, dtype=torch.int8), torch.zeros(2, 4)
    with pytest.raises(ValueError, match=r"codes \(2, 6\).*scales \(2, 4\)"):
        dequant_int8(codes, scales, torch.float32)
    with pytest.raises(ValueError, match="int8 codes.*not torch.float32"):
        dequant_int8(codes.float(), scales, torch.float32)
    packed = torch.zeros(2, 32, dtype=torch.uint8)
    with pytest.raises(ValueError, match="2 groups of 64"):
        dequant_nf4(packed, torch.zeros(3), None, None, None, 64, torch.float32)
    with pytest.raises(ValueError, match="or none of the three"):
        dequant_nf4(packed, torch.zeros(2), None, torch.zeros(1), None, 64, torch.float32)
    with pytest.raises(ValueError, match="uint8 absmax, not"):
        dequant_nf4(packed, torch.zeros(2), torch.zeros(1), torch.zeros(1), torch.zeros(256), 64, torch.float32)
