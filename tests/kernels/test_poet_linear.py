"""poet_linear against dense fp64 products: both routes of its gradients, far from orthogonal too, and what it keeps."""

import gc
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from orthotrain.kernels.cayley import cayley
from orthotrain.kernels.fold import fold
from orthotrain.kernels.poet_linear import cpu, naive, poet_linear, serves
from orthotrain.kernels.poet_linear import op as function


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def orthogonal(blocks, block_size, dtype=torch.float64, std=0.2, seed=0):
    """Displacements of exact rotations."""
    raw = std * torch.randn(blocks, block_size, block_size, dtype=torch.float64, generator=seeded(seed))
    return cayley(raw - raw.mT).to(dtype)


@pytest.fixture
def routes(monkeypatch):
    """Counts how often the gradient is formed by contraction."""
    taken = []
    apply = function.PoetLinearFunction.apply
    monkeypatch.setattr(function.PoetLinearFunction, "apply", lambda *a: (taken.append(1), apply(*a))[1])
    return taken


@st.composite
def sides(draw):
    """Width, blocks, block size, and whether there is a permutation; ``n = 0`` is a side that is not rotated."""
    b, n = draw(st.integers(2, 7)), draw(st.integers(0, 3))
    return n * b + draw(st.integers(0, 4)) or 1, n, b if n else 1, draw(st.booleans())


@settings(max_examples=80, deadline=None)
@given(sides(), sides(), st.sampled_from([(0,), (1,), (7,), (2, 30), ()]), st.booleans(), st.integers(0, 99))
def test_values_and_gradients_equal_the_dense_product(out, into, rows, is_orthogonal, seed):
    options = {"dtype": torch.float64, "generator": seeded(seed)}
    x = torch.randn(*rows, into[0], **options).requires_grad_()
    weight = torch.randn(out[0], into[0], **options)
    drawn = []
    for _, n, b, _ in (out, into):
        d = orthogonal(n, b, seed=seed) if is_orthogonal else torch.randn(n, b, b, **options)
        drawn.append(d.requires_grad_())
    permutations = [torch.randperm(side[0], generator=seeded(seed)) if side[3] else None for side in (out, into)]
    y, expected = poet_linear(x, weight, *drawn, *permutations), naive.poet_linear(x, weight, *drawn, *permutations)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    leaves = [x] + [d for d in drawn if d.numel()]
    probe = torch.randn(y.shape, **options)
    got = torch.autograd.grad((y * probe).sum(), leaves)
    want = torch.autograd.grad((expected * probe).sum(), leaves)
    for actual, exact in zip(got, want, strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-10, atol=1e-10)


# E = (2 stretch + stretch^2) I, of norm 4 times that: within 3.5e-4 the first two, beyond 1/2 the last two
@pytest.mark.parametrize("stretch", [0.0, 2e-5, 1e-4, 1e-3, 0.05, 0.07, 0.5])
def test_rotations_that_are_not_orthogonal_lose_no_digits(stretch, routes, monkeypatch):
    stretched = [
        ((1 + stretch) * orthogonal(2, 16, seed=seed) + stretch * torch.eye(16)).float().requires_grad_()
        for seed in (0, 1)
    ]
    solved, solve = [], cpu.solve_blocks
    monkeypatch.setattr(cpu, "solve_blocks", lambda *a, **k: (solved.append(1), solve(*a, **k))[1])
    x, weight, grad = (torch.randn(n, m, generator=seeded(n)) for n, m in ((90, 32), (48, 32), (90, 48)))
    permutations = torch.randperm(48), torch.randperm(32)
    x.requires_grad_()
    leaves = [x, *stretched]
    got = torch.autograd.grad(poet_linear(x, weight, *stretched, *permutations), leaves, grad)
    assert len(routes) == (stretch < 0.06)
    assert len(solved) == (2 if 4e-5 < stretch < 0.06 else 0)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    y = naive.poet_linear(exact[0], weight.double(), *exact[1:], *permutations)
    for actual, want in zip(got, torch.autograd.grad(y, exact, grad.double()), strict=True):
        assert float((actual - want).norm() / want.norm()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_stay_within_their_rounding(dtype, routes):
    """Also where the rounded rotation is not orthogonal to fp32, which the deviation corrects."""
    drawn = [orthogonal(3, 32, dtype, 0.02, seed).requires_grad_() for seed in (0, 1)]
    x, weight, grad = (torch.randn(n, 100, generator=seeded(n)).to(dtype) for n in (300, 101, 301))
    x.requires_grad_()
    weight, grad, leaves = weight[:100], grad[:300], [x, *drawn]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = poet_linear(x, weight, *drawn)
        got = torch.autograd.grad(y, leaves, grad)
    assert len(routes) == 1 and y.dtype == dtype and [g.dtype for g in got] == [dtype] * 3
    exact = [t.detach().double().requires_grad_() for t in leaves]
    expected = naive.poet_linear(exact[0], weight.double(), *exact[1:], None, None)
    for actual, want in zip(got, torch.autograd.grad(expected, exact, grad.double()), strict=True):
        assert float((actual - want).norm() / want.norm()) < 3 * torch.finfo(dtype).eps


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_gradients_that_are_not_needed_are_not_formed(needs, monkeypatch):
    x, d_out, d_in = torch.randn(5, 8), orthogonal(2, 3, torch.float32), orthogonal(2, 4, torch.float32)
    leaves = [t.requires_grad_(need) for t, need in zip((x, d_out, d_in), needs, strict=True)]
    weight, formed = torch.randn(7, 8), []
    for index, name in ((1, "output_gradient"), (2, "input_gradient")):
        original = getattr(cpu, name)
        spy = lambda *a, original=original, index=index: (formed.append(index), original(*a))[1]  # noqa: E731
        monkeypatch.setattr(cpu, name, spy)
    poet_linear(x, weight, d_out, d_in).sum().backward()
    expected = [t.detach().requires_grad_(t.requires_grad) for t in leaves]
    naive.poet_linear(expected[0], weight, *expected[1:], None, None).sum().backward()
    for got, want in zip(leaves, expected, strict=True):
        assert (got.grad is None) == (want.grad is None)
        if want.grad is not None:
            torch.testing.assert_close(got.grad, want.grad, rtol=1e-5, atol=1e-5)
    assert formed == [k for k in (1, 2) if needs[k]]


@pytest.mark.parametrize("change", [lambda y: y.add_(1), lambda y: y.view(-1)[3:9].mul_(2), lambda y: y.relu_()])
def test_the_result_may_be_changed_in_place_as_that_of_a_linear_layer(change, routes):
    x = torch.randn(6, 8, dtype=torch.float64)
    weight, drawn = torch.randn(9, 8, dtype=torch.float64), [orthogonal(3, 3), orthogonal(2, 4)]
    results = []
    for compute in (poet_linear, lambda x, w, a, b: F.linear(x, fold(w, a, b))):
        leaves = [t.clone().requires_grad_() for t in (x, *drawn)]
        y = compute(leaves[0], weight, *leaves[1:])
        change(y)
        results.append(torch.autograd.grad(y.square().sum(), leaves))
    assert len(routes) == 1
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_nothing_keeps_itself_alive():
    y = poet_linear(torch.randn(3, 4), torch.randn(4, 4), *(torch.zeros(1, 4, 4, requires_grad=True) for _ in "oi"))
    gone = weakref.ref(y)
    gc.disable()
    try:
        del y
        assert gone() is None
    finally:
        gc.enable()


def test_refuses_a_second_derivative():
    x = torch.randn(3, 4, requires_grad=True)
    y = poet_linear(x, torch.randn(2, 4), torch.zeros(1, 2, 2, requires_grad=True), torch.zeros(1, 4, 4))
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_compiles_to_the_fold(routes):
    leaves = [torch.randn(5, 8), orthogonal(2, 3, torch.float32), orthogonal(2, 4, torch.float32)]
    leaves, weight = [t.requires_grad_() for t in leaves], torch.randn(7, 8)
    assert serves(leaves[0]) and not serves(torch.empty(2, device="meta"))

    def loss(compute):
        return compute(leaves[0], weight, *leaves[1:]).square().sum()

    compiled = torch.autograd.grad(loss(torch.compile(poet_linear, backend="aot_eager", fullgraph=True)), leaves)
    assert not routes
    eager = torch.autograd.grad(loss(poet_linear), leaves)
    assert routes
    for got, want in zip(compiled, eager, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(2, 7)}, "7 features .* takes 8"),
        ({"x": torch.zeros(2, 8, dtype=torch.float64)}, "float64 on cpu and the weight torch.float32"),
        ({"d_in": torch.zeros(3, 4, 4)}, "input displacement .* does not fit in width 8"),
        ({"d_out": torch.zeros(1, 4, 3)}, "output displacement .*square"),
        ({"permutation_out": torch.arange(4)}, r"permutation_out is torch.int64 \(4,\)"),
        ({"permutation_in": torch.zeros(8)}, "permutation_in is torch.float32"),
    ],
)
def test_bad_input_names_what_is_wrong(changed, message):
    arguments = {"x": torch.zeros(2, 8), "weight": torch.zeros(5, 8)}
    arguments |= {"d_out": torch.zeros(1, 4, 4), "d_in": torch.zeros(2, 4, 4)}
    with pytest.raises(ValueError, match=f"poet_linear: .*{message}"):
        poet_linear(**arguments | changed)
