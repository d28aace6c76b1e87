"""Gradients at the identity against autograd through D(Q) at Q = 0, in fp64, by both ways."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from orthotrain.kernels.block_rotate import block_rotate
from orthotrain.kernels.dispatch import use_backend
from orthotrain.kernels.skew.cpu import skew_forward
from orthotrain.kernels.tangent import naive, tangent, tangent_linear, tangent_output
from orthotrain.kernels.tangent.cpu import tangent_gradient_forward
from orthotrain.plugins import create

SHAPES = [(24, 16, 4, 4), (23, 17, 4, 5), (10, 30, 10, 3)]  # in, out, block size in and out


def draw(d_in, d_out, b_in, b_out):
    x = torch.randn(3, 7, d_in, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(d_out, d_in, dtype=torch.float64)
    generators = [
        torch.zeros(d // b, b * (b - 1) // 2, dtype=torch.float64, requires_grad=True)
        for d, b in ((d_out, b_out), (d_in, b_in))
    ]
    return x, weight, *generators, torch.randperm(d_out), torch.randperm(d_in)


def gradients(y, inputs):
    probe = torch.sin(torch.arange(y.numel(), dtype=torch.float64)).view(y.shape)
    return torch.autograd.grad((y * probe).sum() + y.square().sum(), inputs)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["cayley", "cayley_neumann", "exponential"])
def test_equals_autograd_through_every_parameterization_at_zero(shape, name):
    x, weight, out, into, permutation_out, permutation_in = draw(*shape)
    b_in, b_out = shape[2:]
    displacement = create(name).displacement
    rotated = block_rotate(x, displacement(into, b_in), permutation_in, permutation_in)
    y = block_rotate(rotated @ weight.T, displacement(out, b_out), permutation_out, permutation_out)
    expected = gradients(y, (x, out, into))
    through_weight = tangent_linear(x, weight, out, into, permutation_out, permutation_in, (b_out, b_in))
    tapped = tangent(tangent(x, into, permutation_in, b_in) @ weight.T, out, permutation_out, b_out)
    for got in (through_weight, tapped):
        assert torch.equal(got, x @ weight.T)
        for g, e in zip(gradients(got, (x, out, into)), expected, strict=True):
            torch.testing.assert_close(g, e, rtol=1e-11, atol=1e-11)


def test_natural_order_and_one_side():
    x, weight, out, into, _, _ = draw(24, 16, 4, 4)
    displacement = create("cayley").displacement
    expected = gradients(block_rotate(x, displacement(into, 4)) @ weight.T, (x, into))
    for y in (tangent(x, into, None, 4) @ weight.T, tangent_linear(x, weight, None, into, None, None, (0, 4))):
        for g, e in zip(gradients(y, (x, into)), expected, strict=True):
            torch.testing.assert_close(g, e, rtol=1e-11, atol=1e-11)


def test_a_factor_of_the_weight_has_its_gradient_through_the_weight():
    x, weight, out, into, permutation_out, permutation_in = draw(24, 16, 4, 4)
    log = torch.tensor([0.4], dtype=torch.float64, requires_grad=True)
    got = tangent_linear(x, weight, out, into, permutation_out, permutation_in, (4, 4), log)
    tapped = tangent(tangent(x, into, permutation_in, 4) @ weight.T, out, permutation_out, 4) * log.exp()
    torch.testing.assert_close(got, tapped, rtol=1e-13, atol=1e-13)
    inputs = (x, out, into, log)
    for g, e in zip(gradients(got, inputs), gradients(tapped, inputs), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-11, atol=1e-11)


def test_compiles_without_graph_breaks():
    x, weight, out, into, permutation_out, permutation_in = draw(24, 16, 4, 4)

    def run(x, out, into):
        return tangent(tangent(x, into, permutation_in, 4) @ weight.T, out, permutation_out, 4)

    def through_weight(x, out, into):
        return tangent_linear(x, weight, out, into, permutation_out, permutation_in, (4, 4))

    for function in (run, through_weight):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        found, expected = (gradients(f(x, out, into), (x, out, into)) for f in (compiled, function))
        for g, e in zip(found, expected, strict=True):
            torch.testing.assert_close(g, e)


def test_refuses_a_second_derivative():
    x, weight, out, into, permutation_out, permutation_in = draw(24, 16, 4, 4)
    product = x @ weight.T
    for y in (
        tangent(x, into, permutation_in, 4),
        tangent_linear(x, weight, out, into, permutation_out, permutation_in, (4, 4)),
        tangent_output(product, x, out, permutation_out, 4, None, lambda x: x @ weight.T),
    ):
        (grad,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.square().sum().backward()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("permuted", [False, True])
def test_gradient_of_rows_and_of_columns(transposed, permuted):
    left, right = (torch.randn(16, 16, dtype=torch.float64) for _ in range(2))
    left, right = (left.mT, right.mT) if transposed else (left, right)
    arguments = (left, right, torch.randperm(16) if permuted else None, 3, 5)
    torch.library.opcheck(torch.ops.orthotrain_v2.tangent_gradient.default, arguments)
    found, expected = tangent_gradient_forward(*arguments), naive.tangent_gradient(*arguments)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_autocast_around_backward_does_not_reach_inside():
    x, weight, out, into, permutation_out, permutation_in = draw(24, 16, 4, 4)
    y = tangent(tangent(x, into, permutation_in, 4) @ weight.T, out, permutation_out, 4)
    plain = gradients(y, (x, out, into))
    with torch.autocast("cpu", torch.bfloat16):
        y = tangent(tangent(x, into, permutation_in, 4) @ weight.T, out, permutation_out, 4)
        assert all(g.dtype == torch.float64 for g in gradients(y, (out, into)))
    assert plain[1].dtype == torch.float64


def test_triton_that_cannot_be_had_is_an_error():
    x, weight, out, into, permutation_out, permutation_in = draw(24, 16, 4, 4)
    y = tangent(x.float(), into.float(), permutation_in, 4)
    with use_backend("triton"), pytest.raises(ValueError, match="tangent: kernels=triton, but"):
        y.sum().backward()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("covered", [256, 192])
def test_rows_in_chunks_add_up(dtype, bound, covered):
    """More rows than a chunk has (2 MiB), the last one shorter, and features outside of the blocks."""
    x, grad = torch.randn(9000, 256).to(dtype), torch.randn(9000, 256).to(dtype)
    permutation, blocks = torch.randperm(256), covered // 32
    got = tangent_gradient_forward(x, grad, permutation, blocks, 32)
    exact = tangent_gradient_forward(x.double(), grad.double(), permutation, blocks, 32)
    left, right = (t.double()[:, permutation[:covered]].unflatten(1, (blocks, 32)) for t in (x, grad))
    product = torch.einsum("nkb,nkc->kbc", left, right)
    rows, columns = torch.triu_indices(32, 32, offset=1)
    torch.testing.assert_close(exact, 2 * (product - product.mT)[:, rows, columns])
    assert got.dtype == torch.float32 and (got - exact).norm() <= bound * exact.norm()


def test_what_is_computed_on_shapes_alone_leaves_nothing_behind():
    def gradient():
        x, generators = torch.randn(4, 8), torch.zeros(2, 6, requires_grad=True)
        tangent(x, generators, None, 4).sum().backward()
        return skew_forward(generators.grad.detach(), 4)

    for _ in range(2):
        with FakeTensorMode():
            gradient()
    assert torch.isfinite(gradient()).all()
