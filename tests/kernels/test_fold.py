"""fold against dense fp64 products."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthotrain.kernels import block_batches
from orthotrain.kernels.fold import fold, naive


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(0, 3), st.integers(2, 6), st.integers(1, 4)),
    st.tuples(st.integers(0, 3), st.integers(2, 6), st.integers(1, 4)),
    st.booleans(),
    st.integers(0, 99),
)
def test_values_and_gradients_equal_the_dense_product(out_side, in_side, permuted, seed):
    (n, b, rest_out), (m, c, rest_in) = out_side, in_side
    rows, columns = n * b + rest_out, m * c + rest_in
    generator = torch.Generator().manual_seed(seed)
    kwargs = {"dtype": torch.float64, "generator": generator}
    weight = torch.randn(rows, columns, **kwargs)
    d_out, d_in = torch.randn(n, b, b, **kwargs).requires_grad_(), torch.randn(m, c, c, **kwargs).requires_grad_()
    permutation_out = torch.randperm(rows, generator=generator) if permuted else None
    permutation_in = torch.randperm(columns, generator=generator) if permuted else None
    folded = fold(weight, d_out, d_in, permutation_out, permutation_in)
    expected = naive.fold(weight, d_out, d_in, permutation_out, permutation_in)
    torch.testing.assert_close(folded, expected, rtol=1e-11, atol=1e-11)
    if not n and not m:
        return
    probe = torch.randn(rows, columns, **kwargs)
    got = torch.autograd.grad((folded * probe).sum(), (d_out, d_in))
    want = torch.autograd.grad((expected * probe).sum(), (d_out, d_in), allow_unused=True)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, torch.zeros_like(g) if w is None else w, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("permuted", ["rows", "columns", "both", "neither"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_rows_in_chunks_give_what_all_rows_at_once_give(monkeypatch, permuted, dtype, limit):
    weight, grad = torch.randn(50, 43).to(dtype), torch.randn(50, 43).to(dtype)
    d_out, d_in = ((torch.randn(*shape) / 10).to(dtype) for shape in ((5, 8, 8), (4, 10, 10)))
    rows = torch.randperm(50) if permuted in ("rows", "both") else None
    columns = torch.randperm(43) if permuted in ("columns", "both") else None

    def results(chunk, kind):
        monkeypatch.setattr(block_batches, "CHUNK_BYTES", chunk)
        leaves = [d.to(kind).requires_grad_() for d in (d_out, d_in)]
        folded = fold(weight.to(kind), *leaves, rows, columns)
        return [folded.detach(), *torch.autograd.grad(folded, leaves, grad.to(kind))]

    exact = results(2**21, torch.float64)
    for chunk in (1, 20 * 43 * dtype.itemsize):
        for found, expected in zip(results(chunk, dtype), exact, strict=True):
            assert found.dtype == dtype
            assert (found.double() - expected).norm() <= limit * expected.norm()


def test_opcheck():
    d_out = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    d_in = torch.randn(1, 4, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 5, dtype=torch.float64)
    torch.library.opcheck(
        torch.ops.orthotrain_v2.fold.default, (weight, d_out, d_in, torch.randperm(7), torch.randperm(5))
    )


def test_bad_input_names_the_side():
    weight = torch.zeros(4, 6)
    with pytest.raises(ValueError, match="output displacement is torch.float64"):
        fold(weight, torch.zeros(1, 2, 2, dtype=torch.float64), torch.zeros(1, 2, 2))
    with pytest.raises(ValueError, match="input displacement .* does not fit in width 6"):
        fold(weight, torch.zeros(1, 2, 2), torch.zeros(4, 2, 2))


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("sides", [(False, False), (True, False), (False, True)])
def test_a_side_without_rotation(sides, permuted):
    torch._dynamo.reset()
    weight = torch.randn(7, 9, dtype=torch.float64)
    d_out, d_in = (
        torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True) if rotated else None for rotated in sides
    )
    permutations = (torch.randperm(7), torch.randperm(9)) if permuted else (None, None)
    found, expected = (f(weight, d_out, d_in, *permutations) for f in (fold, naive.fold))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert found.data_ptr() != weight.data_ptr()
    for leaf in (d for d in (d_out, d_in) if d is not None):
        got, want = (torch.autograd.grad(y.square().sum(), leaf)[0] for y in (found, expected))
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
        compiled = torch.compile(fold, fullgraph=True, backend="aot_eager")(weight, d_out, d_in, *permutations)
        assert torch.equal(torch.autograd.grad(compiled.square().sum(), leaf)[0], got)
    torch.library.opcheck(torch.ops.orthotrain_v2.fold.default, (weight, d_out, d_in, *permutations))
