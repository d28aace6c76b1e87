"""Where permuting by rows pays: only where the offsets of a program's rows fit in 32 bits."""

import pytest
import torch

pytest.importorskip("triton")

from orthotrain.kernels.block_rotate.permutation import rows_at_once, worthwhile


@pytest.mark.parametrize(("stride", "served"), [(2**20 - 1, True), (2**20, False), (2**23, False)])
def test_rows_far_apart(stride, served):
    x = torch.empty_strided((300, 2), (stride, 1), dtype=torch.float16, device="meta")
    assert rows_at_once(2) == 2048
    assert worthwhile(x) == served


@pytest.mark.parametrize(("shape", "served"), [((300, 4096), True), ((255, 4096), False), ((300, 0), False)])
def test_many_rows_with_columns(shape, served):
    assert worthwhile(torch.empty(shape, dtype=torch.float16, device="meta")) == served
