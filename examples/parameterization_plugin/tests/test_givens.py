# ruff: noqa: D103
"""The repository's own grid of properties, on this parameterization, and what is special about it.

Runs against the installed package: `pip install -e .` here, then `pytest tests`.
"""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from orthotrain_givens import Givens
from orthotrain_givens.operator import palindrome, rounds

from orthotrain.kernels.skew import skew
from orthotrain.plugins import create

GRID_FOLDER = Path(__file__).parents[3] / "tests" / "plugins"


def load(name):
    spec = importlib.util.spec_from_file_location(f"grid_{name}", GRID_FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def textbook(parameterization, q):
    """D from the definition: the product of dense rotations, cosines and sines in their places."""
    identity = torch.eye(q.shape[-1], dtype=q.dtype)
    schedule = rounds(q.shape[-1], q.device)
    product = identity
    for left, right in (*schedule, *reversed(schedule)):
        cosine, sine = q[:, left, right].cos(), q[:, left, right].sin()
        rotation = identity.repeat(len(q), 1, 1)
        rotation[:, left, left] = rotation[:, right, right] = cosine
        rotation[:, left, right], rotation[:, right, left] = sine, -sine
        product = product @ rotation
    return product - identity


fixtures, grid = load("conftest"), load("test_properties")
one_thread, generators_of_norm = fixtures.one_thread, fixtures.generators_of_norm
orthogonality_defect = fixtures.orthogonality_defect
grid.textbook, grid.EVERY = textbook, [Givens()]
for name, test in list(vars(grid).items()):
    marks = getattr(test, "pytestmark", []) if name.startswith("test_") else []
    others = [mark for mark in marks if mark.args[0] != "parameterization"]
    if others != marks:
        test.pytestmark = others
        globals()[name] = pytest.mark.parametrize("parameterization", [Givens()], ids=repr)(test)


@pytest.mark.parametrize("block_size", [2, 3, 4, 7, 16, 33])
def test_every_pair_meets_once(block_size):
    schedule = rounds(block_size, torch.device("cpu"))
    pairs = [frozenset(pair) for left, right in schedule for pair in zip(left.tolist(), right.tolist(), strict=True)]
    assert len(pairs) == len(set(pairs)) == block_size * (block_size - 1) // 2
    assert len(schedule) == block_size - 1 + block_size % 2
    for left, right in schedule:
        assert len({*left.tolist(), *right.tolist()}) == 2 * len(left)


def test_the_operator_is_a_good_citizen(generators_of_norm):
    q = skew(generators_of_norm(2, 6, 0.5), 6).requires_grad_()
    torch.library.opcheck(palindrome, (q,))


@pytest.mark.parametrize("norm", [1.0, 10.0, 100.0])
def test_it_is_orthogonal_far_from_zero(norm, generators_of_norm, orthogonality_defect):
    assert orthogonality_defect(Givens().displacement(generators_of_norm(2, 32, norm), 32)) < 1e-13


def test_it_agrees_with_the_exponential_to_second_order(generators_of_norm):
    gaps = []
    for norm in (0.05, 0.1):
        q = generators_of_norm(1, 16, norm)
        gap = Givens().displacement(q, 16) - create("exponential").displacement(q, 16)
        gaps.append(torch.linalg.matrix_norm(gap).item())
    assert math.log2(gaps[1] / gaps[0]) == pytest.approx(3, abs=0.05)


def test_it_is_known_by_name():
    assert create("givens") == Givens()
