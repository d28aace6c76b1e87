"""Autocast stays outside of an operation, in eager mode and in one compiled graph."""

import pytest
import torch

from orthotrain.kernels.operation import without_autocast


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_is_off_inside_and_on_outside(compiled):
    def product(x):
        with without_autocast(x.device.type):
            inside = x @ x
        return inside, x @ x

    run = torch.compile(product, fullgraph=True, backend="aot_eager") if compiled else product
    x = torch.ones(2, 2)
    assert [y.dtype for y in run(x)] == [torch.float32, torch.float32]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert [y.dtype for y in run(x)] == [torch.float32, torch.bfloat16]


def test_a_device_without_autocast_is_no_error():
    with without_autocast("meta"):
        assert (torch.ones(2, 2, device="meta") @ torch.ones(2, 2, device="meta")).dtype == torch.float32
