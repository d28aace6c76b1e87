"""What the rotating operations refuse, and how they say so."""

import pytest
import torch

from orthotrain.kernels.block_rotate import block_rotate
from orthotrain.kernels.fold import fold

BLOCKS = torch.zeros(2, 3, 3)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.arange(5), r"load is torch.int64 \(5,\); a permutation here is int64 \(7,\)"),
        (torch.arange(7, dtype=torch.int32), r"load is torch.int32 \(7,\)"),
        (torch.arange(7, device="meta"), "load is on meta and the data on cpu"),
    ],
)
def test_permutations(index, message):
    with pytest.raises(ValueError, match=message):
        block_rotate(torch.zeros(4, 7), BLOCKS, load=index)
    with pytest.raises(ValueError, match=message.replace("load", "columns")):
        fold(torch.zeros(6, 7), BLOCKS, BLOCKS, columns=index)


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
    with pytest.raises(ValueError, match="store is no permutation"):
        rotate(torch.zeros(4, 7), BLOCKS, torch.randperm(7), index)
    with pytest.raises(ValueError, match="rows is no permutation"):
        fold(torch.zeros(7, 6), BLOCKS, BLOCKS, rows=index)
    rotate(torch.zeros(4, 7), BLOCKS, torch.randperm(7), torch.randperm(7))
