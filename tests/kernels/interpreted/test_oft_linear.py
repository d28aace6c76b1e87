"""oft_linear by the rotation's Triton kernels, against the reference in fp64."""

import pytest
import torch

from orthotrain.kernels.oft_linear import cpu, oft_linear


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.float16, 2e-3)])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
def test_values_and_gradients(dtype, limit, needs):
    x, grad = torch.randn(3, 20, 40).to(dtype).requires_grad_(needs[0]), torch.randn(3, 20, 9).to(dtype)
    displacement = (torch.randn(3, 12, 12) / 12).to(dtype).requires_grad_(needs[1])
    weight, bias = torch.randn(9, 40), torch.randn(9)
    with torch.autocast("cpu", torch.bfloat16):
        y = oft_linear(x, weight, displacement, bias)
        found = torch.autograd.grad(y, [t for t in (x, displacement) if t.requires_grad], grad)
    wide = [t.detach().to(dtype).double() for t in (x, weight, displacement)]
    exact = cpu.oft_linear_forward(*wide, bias.to(dtype).double())
    gradients = [g for g in cpu.oft_linear_backward(grad.double(), *wide, None, *needs, False) if g is not None]
    for got, want in zip((y, *found), (exact, *gradients), strict=True):
        assert got.dtype == dtype and (got.double() - want).norm() <= limit * want.norm()


def test_what_triton_does_not_serve_is_refused():
    with pytest.raises(ValueError, match="oft_linear: kernels=triton, but .*float64.*kernels=auto"):
        oft_linear(torch.zeros(2, 4).double(), torch.zeros(3, 4).double(), torch.zeros(1, 4, 4).double())
