"""block_rotate by its Triton kernels: equal to the fp64 reference within the rounding of its sums, at any shape."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthotrain.kernels.block_rotate import block_rotate, contraction, cpu, permute_columns, tiling

EPSILON = {torch.float32: 2.0**-24, torch.float16: 2.0**-11}
DTYPES = st.sampled_from([torch.float32, torch.float16])


def assert_rounded(found, exact, magnitude, terms):
    """Hold ``found`` to one rounding of a sum of ``terms`` numbers in fp32 whose magnitudes add up to ``magnitude``."""
    assert found.shape == exact.shape and not found.isnan().any()
    # 2^-24 is the smallest subnormal of fp16
    bound = 1.01 * EPSILON[found.dtype] * exact.abs() + terms * 2.0**-24 * magnitude
    bound += 2.0**-25 if found.dtype == torch.float16 else 0.0
    assert ((found.double() - exact).abs() <= bound).all()


def check(rows, d, n, b, dtype, gather=True, scatter=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, d, generator=generator).to(dtype).requires_grad_()
    displacement = (torch.randn(n, b, b, generator=generator) / max(b, 1) ** 0.5).to(dtype).requires_grad_()
    grad = torch.randn(rows, d, generator=generator).to(dtype)
    gather = torch.randperm(d, generator=generator) if gather else None
    scatter = torch.randperm(d, generator=generator) if scatter else None
    y = block_rotate(x, displacement, gather, scatter)
    found = (y, *torch.autograd.grad(y, (x, displacement), grad))
    wide = (x.detach().double(), displacement.detach().double(), grad.double())
    exact, magnitude = (
        (
            cpu.block_rotate_forward(x_, d_, gather, scatter),
            *cpu.block_rotate_backward(g_, x_, d_, gather, scatter),
        )
        for x_, d_, g_ in (wide, tuple(t.abs() for t in wide))
    )
    for triple, terms in zip(zip(found, exact, magnitude, strict=True), (b + 1, b + 1, rows), strict=True):
        assert_rounded(*triple, terms)
    return found


@st.composite
def cases(draw):
    n, b = draw(st.integers(0, 3)), draw(st.integers(1, 20))
    d = n * b + draw(st.integers(0 if n else 1, 40))
    return draw(st.sampled_from([0, 1, 2, 33, 130])), d, n, b, draw(DTYPES), draw(st.booleans()), draw(st.booleans())


@pytest.mark.parametrize("passes", [False, True], ids=["gathered by the programs", "permuted in passes"])
def test_any_shape(passes, monkeypatch):
    monkeypatch.setattr(permute_columns, "FEWEST_ROWS", 1 if passes else 10**9)

    @settings(max_examples=25, deadline=None)
    @given(cases(), st.integers(0, 99))
    def run(case, seed):
        check(*case, seed=seed)

    run()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("n", "b", "rest"), [(2, 64, 3), (1, 67, 70), (1, 150, 0)])
def test_blocks_in_parts(n, b, rest, dtype):
    """150 is two parts of 128 columns in 16 bits, the second one cut off, and five of 32 in fp32."""
    check(40, n * b + rest, n, b, dtype)


def test_a_block_of_512():
    check(70, 520, 1, 512, torch.float16)


def test_offsets_of_64_bits(monkeypatch):
    monkeypatch.setattr(tiling, "LARGEST_OFFSET", 0)
    check(40, 50, 2, 20, torch.float32)


def test_split_rows_are_added_in_order(monkeypatch):
    """The rows fall into three splits; a second run gives the same bits."""
    assert contraction.split_count(300, 1, 32) == 3
    first = check(300, 24, 3, 8, torch.float32, False, False)
    again = check(300, 24, 3, 8, torch.float32, False, False)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_strided_and_expanded_operands():
    base = torch.randn(30, 2, 40)
    x = base[:, 1, ::2]
    displacement = torch.randn(5, 4, 4).mT
    permutation = torch.randperm(20)
    expected = cpu.block_rotate_forward(x.contiguous(), displacement.contiguous(), permutation, None)
    torch.testing.assert_close(block_rotate(x, displacement, permutation), expected)
    x = x.detach().requires_grad_()
    (found,) = torch.autograd.grad(block_rotate(x, displacement, permutation).sum(), x)
    ones = torch.ones(30, 20)
    torch.testing.assert_close(found, cpu.block_rotate_backward(ones, x.detach(), displacement, permutation, None)[0])
    shaped = block_rotate(torch.randn(2, 3, 20), displacement)
    assert shaped.shape == (2, 3, 20)


def test_under_autocast_the_dtype_stays():
    x, displacement = torch.randn(8, 12, requires_grad=True), torch.randn(3, 4, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = block_rotate(x, displacement)
        y.sum().backward()
    assert y.dtype == displacement.grad.dtype == torch.float32
    torch.testing.assert_close(y, cpu.block_rotate_forward(x.detach(), displacement.detach(), None, None))


def test_opcheck_and_full_graph():
    x, displacement = torch.randn(9, 14, requires_grad=True), torch.randn(3, 4, 4, requires_grad=True)
    permutation = torch.randperm(14)
    torch.library.opcheck(torch.ops.orthotrain_v2.block_rotate.default, (x, displacement, permutation, None))
    compiled = torch.compile(block_rotate, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(x, displacement, permutation).square().sum(), (x, displacement))
    expected = torch.autograd.grad(block_rotate(x, displacement, permutation).square().sum(), (x, displacement))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_fp64_is_refused_and_not_computed_elsewhere():
    with pytest.raises(ValueError, match=r"kernels=triton, but .*float64.*kernels=auto"):
        block_rotate(torch.randn(2, 4).double(), torch.zeros(1, 2, 2).double())
