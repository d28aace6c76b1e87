"""Permutations of groups by the Triton kernels: the same bits as feature by feature."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthotrain.kernels.block_rotate import permute_columns
from orthotrain.kernels.dispatch import implementation
from orthotrain.kernels.permutations import GROUPS, by_feature


@pytest.mark.parametrize("passes", [False, True], ids=["by the programs", "in passes"])
@pytest.mark.parametrize("group", GROUPS)
def test_the_same_bits(passes, group, monkeypatch):
    monkeypatch.setattr(permute_columns, "FEWEST_ROWS", 1 if passes else 10**9)

    @settings(max_examples=8, deadline=None)
    @given(
        st.tuples(st.integers(1, 3), st.sampled_from([2, 5, 8, 16, 24]), st.integers(0, 3)),
        st.sampled_from([1, 33]),
        st.sampled_from([torch.float32, torch.float16]),
        st.integers(0, 99),
    )
    def run(shape, rows, dtype, seed):
        n, b, rest = shape
        groups = -(-n * b // group) + rest
        width, generator = groups * group, torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
        x, grad, weight, d = draw(rows, width), draw(rows, width), draw(width, width), draw(n, b, b)
        permutation = torch.randperm(groups, generator=generator)
        rotating, folding, tangents = (implementation(x, name) for name in ("block_rotate", "fold", "tangent"))
        assert rotating.__name__.endswith("triton")

        def results(permutation):
            yield rotating.block_rotate_forward(x, d, permutation, None)
            yield rotating.block_rotate_forward(x, d, None, permutation)
            yield from rotating.block_rotate_backward(grad, x, d, permutation, permutation)
            yield folding.fold_forward(weight, d, d, permutation, permutation)
            yield from folding.fold_backward(weight.mT, weight, d, d, permutation, permutation)
            yield tangents.tangent_gradient_forward(x, grad, permutation, n, b)
            yield tangents.tangent_gradient_forward(weight.mT, weight, permutation, n, b)

        for found, expected in zip(results(permutation), results(by_feature(permutation, width)), strict=True):
            assert torch.equal(found, expected)

    run()
