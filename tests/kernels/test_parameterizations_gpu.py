"""The parameterizations on a GPU, in every dtype that Triton serves, against the references in fp64."""

import pytest
import torch

from orthotrain.kernels.cayley import cayley
from orthotrain.kernels.cayley_neumann import cayley_neumann
from orthotrain.kernels.chain.program import FUSED
from orthotrain.kernels.dispatch import use_backend
from orthotrain.kernels.exponential import exponential
from orthotrain.kernels.skew import skew

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

MAPS = {
    "cayley": lambda g, b: cayley(skew(g, b)),
    "exponential": lambda g, b: exponential(skew(g, b)),
    "cayley_neumann": lambda g, b: cayley_neumann(g, b, 4),
    "cayley_neumann_3": lambda g, b: cayley_neumann(g, b, 3),
}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("block_size", [2, 5, 8, 16, 24, 32, 50, 64, 65, 100, 128, 192, 256, 384])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_values_and_gradients(name, dtype, block_size):
    # PyTorch solves for the blocks that are wider than the kernel of Cayley takes
    choice = "auto" if name == "cayley" and block_size > FUSED else "triton"
    # more blocks than programs for the small ones, so that programs take several
    blocks = 5 if block_size > 64 else 2000
    generators = torch.randn(blocks, block_size * (block_size - 1) // 2, dtype=torch.float64, device="cuda")
    generators = (generators * (0.25 / block_size**0.5)).to(dtype).requires_grad_()
    grad = torch.randn(blocks, block_size, block_size, device="cuda").to(dtype)
    exact = generators.detach().double().requires_grad_()
    with use_backend("reference"):
        expected = MAPS[name](exact, block_size)
        (expected_grad,) = torch.autograd.grad(expected, exact, grad.double())
    with use_backend(choice):
        found = MAPS[name](generators, block_size)
        (found_grad,) = torch.autograd.grad(found, generators, grad)
    for got, want in ((found, expected), (found_grad, expected_grad)):
        assert (got.double() - want).norm() <= TOLERANCE[dtype] * want.norm()
