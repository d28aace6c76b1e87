"""What the rotating operations refuse, and how they say so."""

import pytest
import torch

from orthotrain.kernels.block_rotate import block_rotate
from orthotrain.kernels.cayley import cayley
from orthotrain.kernels.cayley_neumann import cayley_neumann
from orthotrain.kernels.exponential import exponential
from orthotrain.kernels.fold import fold
from orthotrain.kernels.skew import skew

BLOCKS = torch.zeros(2, 3, 3)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.arange(5), r"gather is torch.int64 \(5,\); a permutation here is int64 \(7,\)"),
        (torch.arange(7, dtype=torch.int32), r"gather is torch.int32 \(7,\)"),
        (torch.arange(7, device="meta"), "gather is on meta and the data on cpu"),
    ],
)
def test_permutations(index, message):
    with pytest.raises(ValueError, match=message):
        block_rotate(torch.zeros(4, 7), BLOCKS, gather=index)
    with pytest.raises(ValueError, match=message.replace("gather", "permutation_in")):
        fold(torch.zeros(6, 7), BLOCKS, BLOCKS, permutation_in=index)


def test_devices():
    with pytest.raises(ValueError, match="displacement is on meta and x on cpu"):
        block_rotate(torch.zeros(4, 7), BLOCKS.to("meta"))
    with pytest.raises(ValueError, match="input displacement is on meta and the weight on cpu"):
        fold(torch.zeros(6, 7), BLOCKS, BLOCKS.to("meta"))


@pytest.mark.parametrize("compiled", [False, True])
def test_with_debug_a_repeated_index_is_found(monkeypatch, compiled):
    index = torch.tensor([0, 1, 2, 3, 4, 5, 5])
    rotate = torch.compile(block_rotate, fullgraph=True, backend="aot_eager") if compiled else block_rotate
    monkeypatch.setenv("ORTHOTRAIN_DEBUG", "1")
    with pytest.raises(ValueError, match="scatter is no permutation"):
        rotate(torch.zeros(4, 7), BLOCKS, torch.randperm(7), index)
    with pytest.raises(ValueError, match="permutation_out is no permutation"):
        fold(torch.zeros(7, 6), BLOCKS, BLOCKS, permutation_out=index)
    rotate(torch.zeros(4, 7), BLOCKS, torch.randperm(7), torch.randperm(7))


@pytest.mark.parametrize("op", [cayley, exponential])
@pytest.mark.parametrize(
    ("skew_blocks", "message"),
    [
        (torch.zeros(2, 3, 4), r"skew \(2, 3, 4\) does not fit: it takes square blocks, \(n, b, b\)"),
        (torch.zeros(3, 3), r"skew \(3, 3\) does not fit"),
        (torch.zeros(2, 3, 3, dtype=torch.int64), "skew is torch.int64; takes float16, bfloat16, float32, float64"),
        (torch.zeros(2, 3, 3, dtype=torch.complex64), "skew is torch.complex64; takes"),
    ],
)
def test_blocks_of_a_parameterization(op, skew_blocks, message):
    with pytest.raises(ValueError, match=message):
        op(skew_blocks)


def test_dtypes_that_nothing_computes_in():
    for op in (skew, lambda g, b: cayley_neumann(g, b, 4)):
        with pytest.raises(ValueError, match="generators is torch.int32; takes float16"):
            op(torch.zeros(2, 3, dtype=torch.int32), 3)
    fp8 = torch.float8_e4m3fn
    with pytest.raises(ValueError, match="block_rotate: displacement is torch.float8_e4m3fn; takes"):
        block_rotate(torch.zeros(4, 7).to(fp8), BLOCKS.to(fp8))
