"""fold by the Triton kernels: equal to the fp64 reference within the rounding of its sums."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthotrain.kernels.block_rotate import permute_columns
from orthotrain.kernels.fold import cpu, fold

SIDE = st.tuples(st.integers(0, 3), st.integers(1, 12), st.integers(1, 20))
EPSILON = {torch.float32: 2.0**-24, torch.float16: 2.0**-11}
SMALLEST = {torch.float32: 0.0, torch.float16: 2.0**-20}
"""What the subnormals of fp16, 2^-24 apart, may add up to."""


def assert_rounded(found, exact, magnitude, terms):
    """Hold ``found`` to two roundings, of the half-folded weight and the result, of sums of ``terms`` numbers in fp32.

    Their magnitudes, and not the result, which they may cancel to, tell what rounding can do.
    """
    assert found.shape == exact.shape and not found.isnan().any()
    bound = 1.01 * EPSILON[found.dtype] * (exact.abs() + magnitude) + terms * 2.0**-24 * magnitude
    assert ((found.double() - exact).abs() <= bound + SMALLEST[found.dtype]).all()


def check(out_side, in_side, dtype, permuted, seed=0):
    (n, b, rest_out), (m, c, rest_in) = out_side, in_side
    rows, columns = n * b + rest_out, m * c + rest_in
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

    weight, grad = draw(rows, columns), draw(rows, columns)
    d_out, d_in = draw(n, b, b).requires_grad_(), draw(m, c, c).requires_grad_()
    permutation_out = torch.randperm(rows, generator=generator) if permuted else None
    permutation_in = torch.randperm(columns, generator=generator) if permuted else None
    folded = fold(weight, d_out, d_in, permutation_out, permutation_in)
    found = (folded, *torch.autograd.grad(folded, (d_out, d_in), grad))
    wide = [t.detach().double() for t in (grad, weight, d_out, d_in)]
    exact, magnitude = (
        (
            cpu.fold_forward(*operands, permutation_out, permutation_in),
            *cpu.fold_backward(grad_, *operands, permutation_out, permutation_in),
        )
        for grad_, *operands in (wide, [t.abs() for t in wide])
    )
    for triple in zip(found, exact, magnitude, (b + c + 2, columns + c + 1, rows + b + 1), strict=True):
        assert triple[0].dtype == dtype
        assert_rounded(*triple)


@pytest.mark.parametrize("passes", [False, True], ids=["scattered by the programs", "permuted in passes"])
def test_any_shape(passes, monkeypatch):
    monkeypatch.setattr(permute_columns, "FEWEST_ROWS", 1 if passes else 10**9)

    @settings(max_examples=20, deadline=None)
    @given(st.tuples(SIDE, SIDE, st.sampled_from(list(EPSILON)), st.booleans(), st.integers(0, 99)))
    def run(case):
        check(*case)

    run()


def test_what_cancels_is_held_to_its_terms():
    """1 + D is 1e-5 here: half a place of the half-folded weight is 3e-3 of the result."""
    check((1, 1, 1), (1, 1, 1), torch.float32, permuted=False, seed=99)


@pytest.mark.parametrize("dtype", list(EPSILON))
def test_blocks_in_parts(dtype):
    check((1, 130, 3), (1, 67, 2), dtype, permuted=True)


def test_opcheck_and_full_graph():
    d_out, d_in = torch.randn(2, 3, 3, requires_grad=True), torch.randn(1, 4, 4, requires_grad=True)
    weight, permutations = torch.randn(7, 5), (torch.randperm(7), torch.randperm(5))
    torch.library.opcheck(torch.ops.orthotrain_v2.fold.default, (weight, d_out, d_in, *permutations))
    compiled = torch.compile(fold, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(weight, d_out, d_in, *permutations).square().sum(), (d_out, d_in))
    expected = torch.autograd.grad(fold(weight, d_out, d_in, *permutations).square().sum(), (d_out, d_in))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
