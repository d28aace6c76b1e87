"""block_rotate against dense fp64 products, over shapes that a layer may have."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthotrain.kernels import block_batches
from orthotrain.kernels.block_rotate import block_rotate, naive


@st.composite
def cases(draw):
    b = draw(st.integers(2, 9))
    n = draw(st.integers(0, 4))
    d = n * b + draw(st.integers(0 if n else 1, 5))
    rows = draw(st.sampled_from([(0,), (1,), (7,), (2, 3), ()]))
    return b, n, d, rows, draw(st.booleans()), draw(st.booleans()), draw(st.integers(0, 99))


@settings(max_examples=60, deadline=None)
@given(cases())
def test_values_and_gradients_equal_the_dense_product(case):
    b, n, d, rows, gathers, scatters, seed = case
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*rows, d, dtype=torch.float64, generator=generator, requires_grad=True)
    displacement = torch.randn(n, b, b, dtype=torch.float64, generator=generator, requires_grad=True)
    gather = torch.randperm(d, generator=generator) if gathers else None
    scatter = torch.randperm(d, generator=generator) if scatters else None
    weight = torch.randn(*rows, d, dtype=torch.float64, generator=generator)
    y, expected = block_rotate(x, displacement, gather, scatter), naive.block_rotate(x, displacement, gather, scatter)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    got = torch.autograd.grad((y * weight).sum(), (x, displacement))
    want = torch.autograd.grad((expected * weight).sum(), (x, displacement), allow_unused=True)
    torch.testing.assert_close(got[0], want[0], rtol=1e-12, atol=1e-12)
    if n:
        torch.testing.assert_close(got[1], want[1], rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize(("gather", "scatter"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("size", [4, 144])
def test_rows_in_chunks_give_what_all_rows_at_once_give(monkeypatch, gather, scatter, dtype, limit, size):
    x, grad = torch.randn(37, 300).to(dtype), torch.randn(37, 300).to(dtype)
    displacement = (torch.randn(300 // size, size, size) / 20).to(dtype)
    permutations = [torch.randperm(300) if used else None for used in (gather, scatter)]

    def results(chunk, kind):
        monkeypatch.setattr(block_batches, "CHUNK_BYTES", chunk)
        leaves = [t.to(kind).requires_grad_() for t in (x, displacement)]
        y = block_rotate(*leaves, *permutations)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(kind))]

    exact = results(2**21, torch.float64)
    for chunk in (1, 10 * 300 * dtype.itemsize):
        for found, expected in zip(results(chunk, dtype), exact, strict=True):
            assert found.dtype == dtype
            assert (found.double() - expected).norm() <= limit * expected.norm()


@pytest.mark.parametrize("width", [24, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_permutation_routes(width, dtype):
    x = torch.randn(3, width).to(dtype)
    permutation = torch.randperm(width)
    nothing = torch.zeros(1, 2, 2, dtype=dtype)
    assert torch.equal(block_rotate(x, nothing, gather=permutation), x[:, permutation])
    assert torch.equal(block_rotate(x, nothing, gather=permutation, scatter=permutation), x)


def test_opcheck_and_strided_inputs():
    x = torch.randn(6, 4, dtype=torch.float64).T.requires_grad_()
    displacement = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    permutation = torch.randperm(6)
    torch.library.opcheck(torch.ops.orthotrain_v2.block_rotate.default, (x, displacement, permutation, None))
    torch.autograd.gradcheck(lambda x, d: block_rotate(x, d, permutation, permutation), (x, displacement))
    # a stride-0 gradient, as sum() passes back
    block_rotate(x, displacement, permutation).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


def test_bf16_rounds_once():
    x = torch.randn(64, 32).bfloat16()
    displacement = (0.01 * torch.randn(2, 16, 16)).bfloat16()
    exact = naive.block_rotate(x.double(), displacement.double(), None, None)
    error = (block_rotate(x, displacement).double() - exact).abs()
    assert (error <= 2.0**-8 * exact.abs() + 1e-6).all()


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((1, 4, 4), torch.float64, "float64"),
        ((3, 4, 4), torch.float32, "does not fit in width 8"),
        ((1, 4, 3), torch.float32, "fit"),
    ],
)
def test_bad_input_names_what_is_wrong(shape, dtype, message):
    with pytest.raises(ValueError, match=message):
        block_rotate(torch.zeros(2, 8), torch.zeros(shape, dtype=dtype))
