"""oft_linear against dense fp64 products: both sides of the rotation, both routes of the gradient, both entrances."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthotrain.kernels.block_batches import gram_deviation, inverts_by_transposing, largest_norm
from orthotrain.kernels.cayley import cayley
from orthotrain.kernels.oft_linear import cpu, naive, oft_linear
from orthotrain.kernels.oft_linear.cpu import rotates_weight


def orthogonal(blocks, block_size, dtype, std=0.2, seed=0):
    """Displacements of exact rotations, far from the identity."""
    raw = std * torch.randn(blocks, block_size, block_size, dtype=torch.float64, generator=seeded(seed))
    return cayley(raw - raw.mT).to(dtype)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@st.composite
def cases(draw):
    b, n = draw(st.integers(2, 9)), draw(st.integers(1, 4))
    rows = draw(st.sampled_from([(0,), (1,), (7,), (2, 30), ()]))
    return b, n, n * b + draw(st.integers(0, 5)), draw(st.integers(1, 20)), rows, draw(st.integers(0, 99))


@settings(max_examples=80, deadline=None)
@given(cases(), st.booleans(), st.booleans())
def test_values_and_gradients_equal_the_dense_product(case, is_orthogonal, with_bias):
    b, n, width, out_features, rows, seed = case
    options = {"dtype": torch.float64, "generator": seeded(seed)}
    x = torch.randn(*rows, width, **options).requires_grad_()
    weight = torch.randn(out_features, width, **options)
    displacement = orthogonal(n, b, torch.float64, seed=seed) if is_orthogonal else torch.randn(n, b, b, **options)
    displacement.requires_grad_()
    bias = torch.randn(out_features, **options).requires_grad_() if with_bias else None
    leaves = [x, displacement] + [bias] * with_bias
    y, expected = oft_linear(x, weight, displacement, bias), naive.oft_linear(x, weight, displacement, bias)
    probe = torch.randn(y.shape, **options)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    got = torch.autograd.grad((y * probe).sum(), leaves)
    want = torch.autograd.grad((expected * probe).sum(), leaves)
    for actual, exact in zip(got, want, strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-10, atol=1e-10)


# ||E|| of a block is 8 stretch: the first two and the others lie on both sides of the bound of 3.5e-4
@pytest.mark.parametrize("stretch", [0.0, 2e-5, 5e-5, 1e-3, 0.5])
@pytest.mark.parametrize("tokens", [16, 400])
def test_the_route_through_the_folded_weight_loses_no_digits(stretch, tokens):
    displacement = orthogonal(2, 16, torch.float64)
    # R (1 + stretch): E = (2 stretch + stretch^2) I exactly
    displacement = ((1 + stretch) * displacement + stretch * torch.eye(16)).float()
    norm = largest_norm(gram_deviation(displacement))
    assert inverts_by_transposing(norm, torch.float32) == (stretch < 3e-5)
    x, weight, grad = (torch.randn(n, m, generator=seeded(n)) for n, m in ((tokens, 32), (48, 32), (tokens, 48)))
    assert rotates_weight(tokens, 48) == (tokens == 400)
    got = cpu.oft_linear_backward(grad, x, weight, displacement, None, True, True, False)[:2]
    leaves = [t.double().requires_grad_() for t in (x, displacement)]
    want = torch.autograd.grad(naive.oft_linear(leaves[0], weight.double(), leaves[1], None), leaves, grad.double())
    for actual, exact in zip(got, want, strict=True):
        assert float((actual - exact).norm() / exact.norm()) < 1e-6


@pytest.mark.parametrize("rows", [3, 9])
@pytest.mark.parametrize("needs", [(True, True), (False, True), (True, False)])
def test_the_compiled_op_equals_the_eager_function(rows, needs):
    x = torch.randn(rows, 7, dtype=torch.float64, requires_grad=needs[0])
    displacement = orthogonal(2, 3, torch.float64).requires_grad_(needs[1])
    weight = torch.randn(5, 7, dtype=torch.float64)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    arguments = (x, weight, displacement, bias)
    torch.library.opcheck(torch.ops.orthotrain_v2.oft_linear.default, arguments)
    detached = [t.detach() for t in (torch.randn(rows, 5, dtype=torch.float64), x, weight, displacement)]
    torch.library.opcheck(torch.ops.orthotrain_v2.oft_linear_backward.default, (*detached, bias.detach(), *needs, True))
    leaves = [t for t in arguments if t.requires_grad]
    eager = torch.autograd.grad(oft_linear(*arguments).square().sum(), leaves)
    compiled = torch.compile(oft_linear, backend="aot_eager", fullgraph=True)
    traced = torch.autograd.grad(compiled(*arguments).square().sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(eager, traced, strict=True))
    torch.autograd.gradcheck(lambda *_: oft_linear(*arguments), leaves)


def test_saves_its_arguments_alone():
    x, displacement = torch.randn(40, 8, requires_grad=True), orthogonal(2, 4, torch.float32).requires_grad_()
    weight, saved = torch.randn(6, 8), []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        oft_linear(x, weight, displacement)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in (x, weight, displacement)}


def test_refuses_a_second_derivative():
    x = torch.randn(3, 4, requires_grad=True)
    y = oft_linear(x, torch.randn(2, 4), torch.zeros(1, 4, 4))
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_computes_in_the_dtype_of_x(weight_dtype):
    x = torch.randn(64, 8, dtype=torch.bfloat16, requires_grad=True)
    weight, bias = torch.randn(6, 8).to(weight_dtype), torch.randn(6, requires_grad=True)
    displacement = orthogonal(2, 4, torch.bfloat16).requires_grad_()
    with torch.autocast("cpu", dtype=torch.float16):
        y = oft_linear(x, weight, displacement, bias)
        y.sum().backward()
    exact = naive.oft_linear(*(t.detach().double() for t in (x, weight, displacement, bias)))
    assert y.dtype == x.grad.dtype == displacement.grad.dtype == torch.bfloat16
    assert bias.grad.dtype == torch.float32
    assert float((y.detach() - exact).norm() / exact.norm()) < 2**-7


@pytest.mark.parametrize(
    ("shape", "dtype", "width", "message"),
    [
        ((1, 4, 4), torch.float64, 8, "float64"),
        ((3, 4, 4), torch.float32, 8, "does not fit in width 8"),
        ((1, 4, 3), torch.float32, 8, "fit"),
        ((1, 4, 4), torch.float32, 9, "8 features .* takes 9"),
    ],
)
def test_bad_input_names_what_is_wrong(shape, dtype, width, message):
    with pytest.raises(ValueError, match=message):
        oft_linear(torch.zeros(2, 8), torch.zeros(5, width), torch.zeros(shape, dtype=dtype))
