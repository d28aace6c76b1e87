"""Where permuting by rows pays: only where offsets fit in 32 bits, and not where groups of columns are read at once."""

import pytest
import torch

pytest.importorskip("triton")

from orthotrain.kernels.block_rotate.permute_columns import rows_at_once, worthwhile


@pytest.mark.parametrize(("stride", "served"), [(2**20 - 1, True), (2**20, False), (2**23, False)])
def test_rows_far_apart(stride, served):
    x = torch.empty_strided((300, 2), (stride, 1), dtype=torch.float16, device="meta")
    assert rows_at_once(2) == 2048
    assert worthwhile(x, torch.arange(2)) == served


@pytest.mark.parametrize(("shape", "served"), [((300, 4096), True), ((255, 4096), False), ((300, 0), False)])
def test_many_rows_with_columns(shape, served):
    assert worthwhile(torch.empty(shape, dtype=torch.float16, device="meta"), torch.arange(shape[1])) == served


@pytest.mark.parametrize(("dtype", "group"), [(torch.float16, 8), (torch.float32, 4), (torch.float32, 8)])
def test_not_of_groups_as_wide_as_a_load(dtype, group):
    x = torch.empty(300, 64, dtype=dtype, device="meta")
    assert not worthwhile(x, torch.arange(64 // group)) and worthwhile(x, torch.arange(64 * dtype.itemsize // 8))
