"""A permutation of groups is the same permutation spelled out feature by feature: equal bits from every operation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthotrain.kernels import block_batches
from orthotrain.kernels.block_rotate import block_rotate
from orthotrain.kernels.fold import fold
from orthotrain.kernels.permutations import GROUPS, ColumnPermutation, RowPermutation, by_feature, group_size
from orthotrain.kernels.poet_linear import poet_linear
from orthotrain.kernels.tangent import tangent, tangent_linear

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def results(op, leaves, constants):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    y = op(*leaves, *constants)
    probe = torch.sin(torch.arange(y.numel(), dtype=torch.float64)).view(y.shape).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, probe)]


@st.composite
def sides(draw):
    """Groups of ``g`` features in all, the group, and blocks that may end within one."""
    group, n, b = draw(st.sampled_from(GROUPS)), draw(st.integers(1, 3)), draw(st.integers(2, 12))
    groups = -(-n * b // group) + draw(st.integers(0, 3))
    return groups, group, n, b


def check(out, into, dtype, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(dtype)  # noqa: E731
    (d_out, d_in) = (draw(n, b, b) / 10 for _, _, n, b in (out, into))
    widths = [groups * group for groups, group, _, _ in (out, into)]
    permutations = [torch.randperm(groups, generator=generator) for groups, *_ in (out, into)]
    spelled = [by_feature(permutation, width) for permutation, width in zip(permutations, widths, strict=True)]
    assert [o.shape[0] for o in spelled] == widths
    x, weight = draw(rows, widths[1]), draw(*widths)
    generators = [torch.zeros(n, b * (b - 1) // 2) for _, _, n, b in (out, into)]
    blocks = out[3], into[3]
    for op, leaves, constants in (
        (lambda x, d, permutation: block_rotate(x, d, permutation), [x, d_in], lambda o: [o[1]]),
        (lambda x, d, permutation: block_rotate(x, d, None, permutation), [x, d_in], lambda o: [o[1]]),
        (lambda x, d, permutation: block_rotate(x, d, permutation, permutation), [x, d_in], lambda o: [o[1]]),
        (lambda d, e, *o: fold(weight, d, e, *o), [d_out, d_in], lambda o: o),
        (lambda x, d, e, *o: poet_linear(x, weight, d, e, *o), [x, d_out, d_in], lambda o: o),
        (lambda x, g, permutation: tangent(x, g, permutation, blocks[1]), [x, generators[1]], lambda o: [o[1]]),
        (lambda x, g, h, *o: tangent_linear(x, weight, g, h, *o, blocks), [x, *generators], lambda o: o),
    ):
        for found, expected in zip(
            results(op, leaves, constants(permutations)), results(op, leaves, constants(spelled)), strict=True
        ):
            assert torch.equal(found, expected)


@settings(max_examples=60, deadline=None)
@given(sides(), sides(), st.sampled_from(DTYPES), st.sampled_from([0, 1, 9]), st.integers(0, 99))
def test_every_operation_gives_the_same_bits(out, into, dtype, rows, seed):
    check(out, into, dtype, rows, seed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_chunks_too(monkeypatch, dtype):
    monkeypatch.setattr(block_batches, "CHUNK_BYTES", 500)
    check((9, 8, 2, 32), (7, 8, 3, 16), dtype, 21, 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", GROUPS)
def test_all_bits_move_unchanged_whatever_the_layout(dtype, group):
    """NaN with a payload, too, and rows that are no whole number of units, transposed or expanded."""
    kind = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    values = torch.randint(torch.iinfo(kind).min, torch.iinfo(kind).max, (6, 40), dtype=kind)
    permutation = torch.randperm(32 // group)
    columns, places = ColumnPermutation(permutation, torch.empty(0, 32, dtype=dtype)), by_feature(permutation, 32)
    tall = torch.randint(-9, 9, (32, 6), dtype=kind)
    for x in (values[:, :32].contiguous(), values[:, 3:35], values[1:2, 1:33].expand(6, 32), tall.mT):
        gathered = columns.gather_into(torch.zeros(6, 32, dtype=dtype), x.view(dtype))
        assert torch.equal(gathered.view(kind), x[:, places])
        scattered = torch.zeros(6, 32, dtype=dtype)
        columns.scatter_into(scattered, x.view(dtype))
        assert torch.equal(scattered.view(kind)[:, places], x)


def test_an_order_tells_its_group_by_its_length():
    assert [group_size(torch.arange(24 // group), 24) for group in GROUPS] == list(GROUPS)
    assert group_size(None, 24) == 1 and group_size(torch.arange(0), 0) == 1


@pytest.mark.parametrize("length", [0, 1, 2, 5, 23, 25])
def test_other_lengths_are_refused_with_those_that_fit(length):
    with pytest.raises(ValueError, match=r"int64 \(24,\) or \(12,\) or \(6,\) or \(3,\)"):
        block_rotate(torch.zeros(2, 24), torch.zeros(1, 8, 8), torch.arange(length))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(GROUPS), st.integers(1, 9), st.integers(0, 5), st.integers(0, 99), st.sampled_from(DTYPES))
def test_rows_move_to_their_places_in_ranges_that_may_cut_a_group(group, groups, width, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    height = group * groups
    permutation = torch.randperm(groups, generator=generator)
    x = torch.randn(height, width, generator=generator).to(dtype)
    rows, spelled = RowPermutation(permutation, height), by_feature(permutation, height)
    first, last = sorted(torch.randint(0, height + 1, (2,), generator=generator).tolist())
    places, out = slice(first, last), torch.zeros_like(x)
    assert torch.equal(rows.gather(x, places), x[spelled[places]])
    rows.scatter_into(out, places, x[places])
    assert torch.equal(out[spelled[places]], x[places]) and int((out != 0).sum()) <= x[places].numel()
    plain = RowPermutation(None, height)
    plain.scatter_into(out, places, plain.gather(x, places))
    assert torch.equal(out[places], x[places])
