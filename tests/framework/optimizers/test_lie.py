"""The optimizer of generators: directions, alternation, angles, batching and resume."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounter

from orthotrain.errors import ConfigurationError
from orthotrain.kernels.skew import skew
from orthotrain.optimizers import LieOptimizer
from orthotrain.optimizers.lie import checked_block_size, orthogonalize


def generators(*shapes, seed=0):
    torch.manual_seed(seed)
    return [torch.nn.Parameter(torch.zeros(n, b * (b - 1) // 2)) for n, b in shapes]


def step(parameters, optimizer, seed):
    """One step with random gradients; returns how the generators moved, and folds them away."""
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()
    moved = [p.detach().clone() for p in parameters]
    for p in parameters:
        p.data.zero_()
    return moved


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 24), st.integers(1, 3), st.integers(0, 9))
def test_orthogonalized_blocks_have_singular_values_near_one(size, blocks, seed):
    torch.manual_seed(seed)
    moment = torch.randn(blocks, size * (size - 1) // 2) * 10.0 ** (seed - 5)
    x = skew(orthogonalize(moment, size), size)
    values = torch.linalg.svdvals(x)
    assert values.max() < 1.25
    before = torch.linalg.svdvals(skew(moment, size))
    # what is not negligible beside the largest comes near 1
    assert (values[before > 0.2 * before[:, :1]] > 0.5).all()
    # the same directions: X commutes with the moment, both being functions of it
    q = skew(moment, size) / before.max()
    torch.testing.assert_close(x @ q, q @ x, rtol=0, atol=1e-4)


def test_it_descends():
    (p,) = generators((2, 6))
    target = torch.randn(2, 15)
    optimizer = LieOptimizer([p], lr=0.02, alternate=False)
    distances = []
    position = torch.zeros_like(target)
    for _ in range(60):
        p.grad = position - target
        optimizer.step()
        position += p.detach()
        p.data.zero_()
        distances.append(float((position - target).norm()))
    assert distances[-1] < 0.7 * distances[0] and distances[-1] < distances[30]


@pytest.mark.parametrize("direction", ["orthogonal", "adam", "sign"])
def test_one_step_has_the_size_of_its_angle(direction):
    (p,) = generators((3, 16))
    (moved,) = step([p], LieOptimizer([p], lr=0.01, direction=direction, alternate=False), 1)
    size = skew(moved, 16).flatten(1).norm(dim=1) / math.sqrt(16) / 0.01
    expected = {"orthogonal": (0.7, 1.2), "adam": (0.9, 2.1), "sign": (1 - 1e-5, 1 + 1e-5)}[direction]
    assert (size >= expected[0]).all() and (size <= expected[1]).all(), size


def test_movement_is_matched_exactly():
    (p,) = generators((3, 16))
    optimizer = LieOptimizer([p], lr=0.01, movement=0.5, alternate=False, direction="adam")
    (moved,) = step([p], optimizer, 1)
    weight = torch.randn(48, 200)
    displacement = torch.matrix_exp(2 * skew(moved, 16)) - torch.eye(16)
    change = torch.bmm(displacement.mT, weight.view(3, 16, 200)).flatten(0, 1)
    assert float(change.norm() / weight.norm()) == pytest.approx(0.01 * 0.5, rel=0.03)


def test_sides_alternate_and_both_moments_advance():
    out, into = generators((2, 4), (2, 4))
    groups = [{"params": [out], "side": "out"}, {"params": [into], "side": "in"}]
    optimizer = LieOptimizer(groups, lr=0.01)
    for turn in range(4):
        moved_out, moved_in = step([out, into], optimizer, turn)
        assert bool(moved_out.any()) == (turn % 2 == 0) and bool(moved_in.any()) == (turn % 2 == 1)
    assert optimizer.state[out]["step"] == optimizer.state[into]["step"] == 4


def test_a_batch_over_layers_moves_each_as_alone():
    shapes = [(2, 6), (3, 4), (1, 6), (2, 4)]
    together = generators(*shapes)
    moved = step(together, LieOptimizer(together, alternate=False), 0)
    for place, shape in enumerate(shapes):
        (alone,) = generators(shape)
        alone.grad = together[place].grad
        LieOptimizer([alone], alternate=False).step()
        torch.testing.assert_close(alone.detach(), moved[place])


@pytest.mark.parametrize("direction", ["orthogonal", "adam", "sign"])
def test_resumes_to_the_same_bits(direction):
    straight = generators((2, 6), (3, 4))
    optimizer = LieOptimizer(straight, direction=direction)
    expected = [step(straight, optimizer, s) for s in range(6)][-1]
    first = generators((2, 6), (3, 4))
    optimizer = LieOptimizer(first, direction=direction)
    for s in range(3):
        step(first, optimizer, s)
    saved = copy.deepcopy(optimizer.state_dict())
    second = generators((2, 6), (3, 4))
    resumed = LieOptimizer(second, direction=direction)
    resumed.load_state_dict(saved)
    got = [step(second, resumed, s) for s in range(3, 6)][-1]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_state_is_a_third_of_adamws_and_less():
    d, b = 256, 128
    (p,) = generators((2 * d // b, b))
    optimizer = LieOptimizer([p])
    step([p], optimizer, 0)
    held = sum(t.nbytes for t in optimizer.state[p].values() if isinstance(t, torch.Tensor))
    assert held <= 0.35 * 2 * 4 * d * d


def test_bad_input():
    (p,) = generators((2, 4))
    for angle in (0.0, -0.1, 0.11):
        with pytest.raises(
            ConfigurationError, match=rf"an angle of {angle} rad a step: take one above 0 and up to 0.1"
        ):
            LieOptimizer([p], lr=angle)
    with pytest.warns(UserWarning, match="0.03 rad a step is a large angle"):
        LieOptimizer([p], lr=0.03)
    with pytest.raises(ConfigurationError, match=r"takes generators alone, not a parameter of shape \(3,\)"):
        LieOptimizer([torch.nn.Parameter(torch.zeros(3))])
    with pytest.raises(ConfigurationError, match="a width of 7 is that of no skew block"):
        LieOptimizer([torch.nn.Parameter(torch.zeros(2, 7))])
    with pytest.raises(ConfigurationError, match="give it as rotation_optimizer"):
        LieOptimizer([{"params": [p], "name": "decay"}])
    with pytest.raises(ConfigurationError, match="direction='up'"):
        LieOptimizer([p], direction="up")
    with pytest.raises(ConfigurationError, match="weight_decay must be 0"):
        LieOptimizer([p], weight_decay=0.1)
    assert checked_block_size(1) == 2 and checked_block_size(2016) == 64


@pytest.mark.parametrize("direction", ["orthogonal", "adam", "sign"])
def test_a_compiled_step_is_the_same_and_is_compiled_once(direction):
    torch._dynamo.reset()
    counter = CompileCounter()
    made = []
    for _ in range(2):
        parameters = [nn.Parameter(torch.zeros(n, width)) for n, width in ((3, 28), (2, 28), (2, 6))]
        made.append((parameters, LieOptimizer(parameters, lr=0.01, direction=direction, alternate=False)))
    steps = [made[0][1].step, torch.compile(made[1][1].step, backend=counter)]
    frames = []
    for _ in range(5):
        gradients = [torch.randn_like(p) for p in made[0][0]]
        for (parameters, _), step in zip(made, steps, strict=True):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.clone()
            step()
        frames.append(counter.frame_count)
        for eager, compiled in zip(made[0][0], made[1][0], strict=True):
            torch.testing.assert_close(compiled, eager, rtol=1e-6, atol=1e-7)
    assert 0 < frames[1] == frames[-1]
