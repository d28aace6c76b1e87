"""Rotations, folds, skew blocks and unpacking by the Triton kernels on a GPU, against the references in fp64."""

import pytest
import torch

from orthotrain.kernels.block_rotate import block_rotate
from orthotrain.kernels.dequant import dequant_int8, dequant_nf4
from orthotrain.kernels.dispatch import use_backend
from orthotrain.kernels.fold import fold
from orthotrain.kernels.oft_linear import oft_linear
from orthotrain.kernels.skew import skew

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Relative error (Frobenius): two to four roundings of a sum."""

blocks_of = pytest.mark.parametrize("block_size", [32, 128, 512, 1024])
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def draw(*shape, dtype=torch.float32, scale=1.0):
    return (scale * torch.randn(*shape, device="cuda")).to(dtype)


def hold(op, leaves, grad):
    """Value and gradients within the tolerance of the reference in fp64; a second run gives the same bits."""

    def results(choice, dtype):
        operands = [t.to(dtype).requires_grad_() for t in leaves]
        with use_backend(choice):
            value = op(*operands)
            return [value.detach(), *torch.autograd.grad(value, operands, grad.to(dtype))]

    found, again = results("triton", grad.dtype), results("triton", grad.dtype)
    for got, repeated, want in zip(found, again, results("reference", torch.float64), strict=True):
        assert got.dtype == grad.dtype and torch.equal(got, repeated)
        assert (got.double() - want).norm() <= TOLERANCE[grad.dtype] * want.norm()


@blocks_of
@every_dtype
@pytest.mark.parametrize("rows", [1, 70, 600])  # 600 are permuted in passes
@pytest.mark.parametrize("permuted", [False, True])
def test_block_rotate(block_size, dtype, rows, permuted):
    width = 2 * block_size + 7
    gather, scatter = (torch.randperm(width, device="cuda") if permuted else None for _ in range(2))
    displacement = draw(2, block_size, block_size, dtype=dtype, scale=block_size**-0.5)
    grad = draw(rows, width, dtype=dtype)
    hold(lambda x, d: block_rotate(x, d, gather, scatter), [draw(rows, width, dtype=dtype), displacement], grad)


@blocks_of
@every_dtype
@pytest.mark.parametrize("permuted", [False, True])
def test_fold(block_size, dtype, permuted):
    shape = (block_size + 5, 2 * block_size + 3)
    permutations = [torch.randperm(width, device="cuda") if permuted else None for width in shape]
    weight = draw(*shape, dtype=dtype)
    sides = [draw(n, block_size, block_size, dtype=dtype, scale=block_size**-0.5) for n in (1, 2)]
    hold(lambda d_out, d_in: fold(weight.to(d_in.dtype), d_out, d_in, *permutations), sides, draw(*shape, dtype=dtype))


@blocks_of
@every_dtype
def test_oft_linear(block_size, dtype):
    weight, x = draw(96, 2 * block_size, dtype=dtype), draw(70, 2 * block_size, dtype=dtype)
    displacement = draw(2, block_size, block_size, dtype=dtype, scale=block_size**-0.5)
    hold(lambda x, d: oft_linear(x, weight.to(x.dtype), d), [x, displacement], draw(70, 96, dtype=dtype))


@blocks_of
@every_dtype
def test_skew(block_size, dtype):
    generators = draw(3, block_size * (block_size - 1) // 2, dtype=dtype)
    hold(lambda g: skew(g, block_size), [generators], draw(3, block_size, block_size, dtype=dtype))


@every_dtype
@pytest.mark.parametrize("columns", [128, 1024])
def test_unpacking_gives_the_bits_of_the_reference(dtype, columns):
    codes = torch.randint(-127, 128, (33, columns), dtype=torch.int8, device="cuda")
    scales = torch.rand(33, columns // 64, device="cuda")
    packed = torch.randint(0, 256, (33, columns // 2), dtype=torch.uint8, device="cuda")
    groups = 33 * columns // 64
    double = torch.randint(0, 256, (groups,), dtype=torch.uint8, device="cuda")
    nested = [torch.rand(size, device="cuda") for size in (-(-groups // 256), 1, 256)]

    def results():
        plain = dequant_nf4(packed, torch.full((groups,), 0.3, device="cuda"), [], 64, dtype)
        return dequant_int8(codes, scales, dtype), plain, dequant_nf4(packed, double, nested, 64, dtype)

    with use_backend("triton"):
        found = results()
    with use_backend("reference"):
        assert all(torch.equal(got, want) for got, want in zip(found, results(), strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_device_than_the_current_one():
    with use_backend("triton"):
        q = skew(torch.randn(3, 6, device="cuda:1", requires_grad=True), 4)
        q.sum().backward()
    assert q.device == torch.device("cuda", 1)
