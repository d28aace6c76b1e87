"""Unpacking by the Triton kernels: equal to the reference to the last bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthotrain.kernels.dequant import cpu, dequant_int8, dequant_nf4, triton

DTYPES = st.sampled_from([torch.float32, torch.float16])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 9), st.integers(1, 5), st.integers(1, 90), DTYPES)
def test_int8(rows, groups, group_size, dtype):
    codes = torch.randint(-127, 128, (rows, groups * group_size), dtype=torch.int8)
    scales = torch.rand(rows, groups)
    assert torch.equal(dequant_int8(codes, scales, dtype), cpu.dequant_int8_forward(codes, scales, dtype))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("shape", "group_size"), [((3, 10), 32), ((4, 64), 64), ((67, 250), 32), ((0, 64), 64)])
def test_nf4(shape, group_size, dtype, double):
    """(67, 250) is more groups than one of the nested scales serves, and more values than one program."""
    packed = torch.randint(0, 256, (shape[0], shape[1] // 2), dtype=torch.uint8)
    groups = -(-shape[0] * shape[1] // group_size)
    absmax, nested = torch.rand(groups), ()
    if double:
        absmax = torch.randint(0, 256, (groups,), dtype=torch.uint8)
        nested = (torch.rand(-(-groups // 256)), torch.rand(1), torch.randn(256).sort().values)
    found = dequant_nf4(packed, absmax, nested, group_size=group_size, dtype=dtype)
    assert found.shape == shape
    assert torch.equal(found, cpu.dequant_nf4_forward(packed, absmax, nested, group_size, dtype))


def test_the_places_of_a_large_weight():
    """The size is given in bytes, and twice it does not fit in 32 bits: one program of such a launch."""
    packed = torch.randint(0, 256, (1, triton.SIZE // 2), dtype=torch.uint8)
    scales, out = torch.rand(triton.SIZE // 64), torch.full((1, triton.SIZE), torch.nan)
    levels = torch.tensor(cpu.NF4_LEVELS)
    arguments = (packed, scales, None, None, None, levels, out, 2**30)
    triton._nf4_kernel[(1,)](*arguments, GROUP=64, SIZE=triton.SIZE)
    assert torch.equal(out, cpu.dequant_nf4_forward(packed, scales, (), 64, torch.float32))


def test_several_programs():
    codes = torch.randint(-127, 128, (5, 1000), dtype=torch.int8)
    assert codes.numel() > triton.SIZE
    scales = torch.rand(5, 4)
    assert torch.equal(
        dequant_int8(codes, scales, torch.float32), cpu.dequant_int8_forward(codes, scales, torch.float32)
    )
