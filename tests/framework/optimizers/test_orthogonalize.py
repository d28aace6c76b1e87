"""The direction of a step: its singular values, and the turn of a step in radians."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthotrain import plugins
from orthotrain.kernels.skew import skew
from orthotrain.layers.rotation.generator_marks import mark_generators
from orthotrain.optimizers import LieOptimizer
from orthotrain.optimizers.orthogonalize import CUSHION, MARGIN, QUINTICS, SMALLEST, bounds, orthogonalize

ROOT = Path(__file__).resolve().parents[3]
_spec = importlib.util.spec_from_file_location("angles", ROOT / "tests/benchmarks/angles.py")
angles = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(angles)

MINIMAX = 0.0193
"""Largest distance from 1 that the quintics leave in exact arithmetic."""

ROUNDING = 2 * 2**-8
"""The last step rounds its factor and its result to bf16, each by at most 2^-9 of an entry; twice that for the noise of
the steps before, which the last quintic (slope at most 2 where it matters) passes on."""


def from_spectrum(values, size, seed):
    """Generators of one block with these singular values, each of a plane, in fp64."""
    torch.manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0]
    block = torch.zeros(size, size, dtype=torch.float64)
    for plane, value in enumerate(values):
        block[2 * plane, 2 * plane + 1], block[2 * plane + 1, 2 * plane] = value, -value
    block = basis @ block @ basis.mT
    rows, columns = torch.triu_indices(size, size, 1)
    return block[rows, columns][None]


def test_the_quintics_are_the_minimax_ones():
    derived, error = angles.quintics(SMALLEST, CUSHION, MARGIN, len(QUINTICS))
    assert error == pytest.approx(MINIMAX, abs=5e-5)
    for printed, exact in zip(QUINTICS, derived, strict=True):
        assert printed == pytest.approx(exact, rel=1e-5)
    values = torch.cat([torch.logspace(-8, 0, 4000), torch.linspace(0, 1, 4000)]).double()
    brought = values.clone()
    for a, b, c in QUINTICS:
        brought = a * brought + b * brought**3 + c * brought**5
    counts = values >= SMALLEST
    assert (brought[counts] - 1).abs().max() < MINIMAX + 1e-4
    assert (brought >= 0).all() and brought.max() < 1 + MINIMAX + 1e-4


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_singular_values_come_to_one_and_negligible_ones_do_not_pass_it(data):
    size = data.draw(st.integers(2, 48))
    spectrum = st.lists(st.floats(-4, 0), min_size=size // 2, max_size=size // 2)
    values = 10 ** torch.tensor(data.draw(spectrum), dtype=torch.float64)
    scale = 10.0 ** data.draw(st.sampled_from([-37, -20, 0, 15, 37]))
    moment = from_spectrum(values / values.max(), size, data.draw(st.integers(0, 9)))
    x = skew(orthogonalize((moment * scale).float(), size), size)
    assert x.dtype == torch.float32 and torch.equal(x, -x.mT)
    assert torch.linalg.svdvals(x).max() <= 1 + MINIMAX + ROUNDING
    # the bound is at most 1.01 (b/2)^(1/8) times the largest value, and rounding of the moment to bf16 moves a value by
    # about 2^-9 of the largest
    limit = (1 + MARGIN) * SMALLEST * (size / 2) ** 0.125 + 2**-9
    count = 2 * int((values / values.max() > limit).sum())
    assert torch.linalg.svdvals(x)[0, :count].min() >= 1 - MINIMAX - ROUNDING


@pytest.mark.parametrize("size", [2, 3, 8, 33])
def test_the_bound_of_the_singular_values_is_tight(size):
    moments = torch.randn(5, size * (size - 1) // 2)
    moments[4] = torch.eye(1, moments.shape[1])  # a block of one plane
    x = skew(moments / moments.abs().amax(1, keepdim=True), size)
    ratios = bounds(x.mT @ x).flatten() / torch.linalg.matrix_norm(x, 2)
    assert ratios.min() > 1 + MARGIN - 1e-5 and ratios.max() < (1 + MARGIN) * (size // 2) ** 0.125 + 1e-5
    assert ratios[4] == pytest.approx(1 + MARGIN) and bounds(torch.zeros(1, size, size)) > 0


def test_blocks_of_zeros_stay_and_others_beside_them_do_not_matter():
    moments = torch.randn(3, 28)
    moments[1] = 0
    x = orthogonalize(moments, 8)
    assert not x[1].any() and torch.equal(x[2:], orthogonalize(moments[2:] * 4, 8))


@pytest.mark.parametrize("parameterization", ["cayley", "exponential", "cayley_neumann", "order 2"])
@pytest.mark.parametrize(("direction", "worst"), [("orthogonal", 0.05), ("adam", None), ("sign", None)])
def test_a_step_turns_by_the_learning_rate(parameterization, direction, worst):
    """Angles of the eigenvalues of R, in fp64."""
    lr, size = 0.05, 32
    parameter = torch.nn.Parameter(torch.zeros(3, size * (size - 1) // 2))
    mark_generators(parameter, 1.0)
    optimizer = LieOptimizer([parameter], lr=lr, direction=direction)
    parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    order = {"class_path": "cayley_neumann", "init_args": {"order": 2}}
    plugin = plugins.create(order if parameterization == "order 2" else parameterization)
    rotation = torch.eye(size) + plugin.displacement(parameter.detach().double(), size)
    turns = torch.linalg.eigvals(rotation).angle().abs()
    assert float(turns.square().mean().sqrt()) == pytest.approx(lr, rel=worst or lr**2)
    if worst:
        assert float(turns.mean()) == pytest.approx(lr, rel=worst)
        assert float(turns.max()) == pytest.approx(lr, rel=worst)
    # downhill: the rotation goes against the gradient
    assert float((parameter.detach() * parameter.grad).sum()) < 0


def test_the_committed_measurement_holds():
    results = json.loads(angles.OUT.read_text())["results"]
    for row in results["rows"]:
        assert abs(row["ours"]["mean"] - 1) < 0.05 and abs(row["ours"]["largest"] - 1) < 0.05, row
        # in small blocks rounding of the moment to bf16 hides values of about 1e-3
        assert abs(row["ours"]["smallest"] - 1) < 0.05 or row["size"] < 32, row
    row = next(row for row in results["rows"] if (row["moments"], row["size"]) == (3, 64))
    moments = angles.blocks(3, 32, 64)
    now = angles.measure(moments, orthogonalize(moments, 64), 64)
    assert now == pytest.approx(row["ours"], abs=2 * ROUNDING)
    assert math.isclose(now["negligible"], row["ours"]["negligible"])
