"""The optimizer of generators: directions, moments, alternation, batching and resume."""

import copy
import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from orthotrain.errors import ConfigurationError
from orthotrain.kernels.skew import skew
from orthotrain.layers.rotation.generator_marks import mark_generators
from orthotrain.optimizers import LieOptimizer
from orthotrain.optimizers.orthogonalize import orthogonalize


def generators(*shapes, seed=0):
    torch.manual_seed(seed)
    made = [torch.nn.Parameter(torch.zeros(n, b * (b - 1) // 2)) for n, b in shapes]
    for parameter in made:
        mark_generators(parameter, 1.0)
    return made


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


def test_it_descends():
    (p,) = generators((2, 6))
    target = torch.randn(2, 15)
    optimizer = LieOptimizer([p], lr=0.035, alternate=False)
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
    size = 2 * skew(moved, 16).flatten(1).norm(dim=1) / math.sqrt(16) / 0.01
    # adam's first step has |m| = (1 - 0.95^2) / (1 - 0.95^2) of |g|, so that it is the sign
    expected = {"orthogonal": (0.95, 1.05), "adam": (1 - 1e-5, 1 + 1e-5), "sign": (1 - 1e-5, 1 + 1e-5)}[direction]
    assert (size >= expected[0]).all() and (size <= expected[1]).all(), size


def test_sides_alternate_and_both_moments_advance():
    out, into = generators((2, 4), (2, 4))
    groups = [{"params": [out], "side": "out"}, {"params": [into], "side": "in"}]
    optimizer = LieOptimizer(groups, lr=0.01)
    for turn in range(4):
        moved_out, moved_in = step([out, into], optimizer, turn)
        assert bool(moved_out.any()) == (turn % 2 == 0) and bool(moved_in.any()) == (turn % 2 == 1)
    assert optimizer.state[out]["step"] == optimizer.state[into]["step"] == 4


def test_a_side_that_is_alone_moves_every_step():
    out, into, alone = generators((2, 4), (2, 4), (2, 4))
    groups = [{"params": [p], "side": side} for p, side in ((out, "out"), (into, "in"), (alone, "only"))]
    optimizer = LieOptimizer(groups, lr=0.01)
    for turn in range(4):
        moved_out, moved_in, moved_alone = step([out, into, alone], optimizer, turn)
        assert bool(moved_out.any()) != bool(moved_in.any()) and moved_alone.any()


@pytest.mark.parametrize("nesterov", [True, False])
def test_the_moment_is_nesterovs(nesterov):
    (p,) = generators((2, 4))
    optimizer = LieOptimizer([p], lr=0.01, momentum=0.9, nesterov=nesterov, direction="orthogonal")
    moment = torch.zeros(2, 6)
    for turn in range(4):
        (moved,) = step([p], optimizer, turn)
        moment = 0.9 * moment + 0.1 * p.grad
        ahead = 0.9 * moment + 0.1 * p.grad if nesterov else moment
        torch.testing.assert_close(moved, -0.005 * orthogonalize(ahead, 4))


@pytest.mark.parametrize("nesterov", [True, False])
def test_adam_is_corrected_for_the_start_of_both_moments(nesterov):
    """In layers whose counts differ: each is corrected by its own."""
    late, early = generators((2, 4), (1, 4))
    optimizer = LieOptimizer(
        [late, early], lr=0.01, momentum=0.9, beta2=0.8, nesterov=nesterov, direction="adam", alternate=False
    )
    step([early], optimizer, 9)
    late.grad = early.grad = None
    optimizer.state.pop(early)
    first, second, gradients = torch.zeros(2, 6), torch.zeros(2, 6), []
    for turn in range(5):
        moved = step([late, early] if turn > 1 else [late], optimizer, turn)[0]
        gradients.append(late.grad)
        first, second = 0.9 * first + 0.1 * late.grad, 0.8 * second + 0.2 * late.grad**2
        # the weights of all gradients in the moment must add up to 1
        ahead, weight = (
            (0.9 * first + 0.1 * late.grad, 1 - 0.9 ** (turn + 2)) if nesterov else (first, 1 - 0.9 ** (turn + 1))
        )
        expected = ahead / weight / (second / (1 - 0.8 ** (turn + 1))).sqrt()
        torch.testing.assert_close(moved, -0.005 * expected / math.sqrt(3))
    assert optimizer.state[late]["step"] == 5 and optimizer.state[early]["step"] == 3


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


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ({"direction": "adam"}, "was trained with direction='orthogonal', this run has 'adam'"),
        ({"nesterov": False}, "was trained with nesterov=True, this run has False"),
        ({"alternate": False}, "was trained with alternate=True, this run has False"),
        ({"movement": 0.5}, "was trained with movement=None, this run has 0.5"),
    ],
)
def test_state_of_another_setting_is_refused(now, message):
    (p,) = generators((2, 4))
    optimizer = LieOptimizer([p])
    step([p], optimizer, 0)
    saved = optimizer.state_dict()
    LieOptimizer([p]).load_state_dict(saved)
    with pytest.raises(ConfigurationError, match=message):
        LieOptimizer([p], **now).load_state_dict(saved)
    with pytest.raises(ConfigurationError, match="has no direction: it is the state of another"):
        LieOptimizer([p]).load_state_dict(torch.optim.AdamW([p]).state_dict())


@pytest.mark.parametrize(("direction", "share"), [("orthogonal", 0.25), ("sign", 0.25), ("adam", 0.5)])
def test_state_at_half_the_width_is_a_quarter_of_adamws_or_with_adam_half(direction, share):
    d, b = 256, 128
    (p,) = generators((2 * d // b, b))
    optimizer = LieOptimizer([p], direction=direction)
    step([p], optimizer, 0)
    held = sum(t.nbytes for t in optimizer.state[p].values() if isinstance(t, torch.Tensor))
    assert held / (2 * 4 * d * d) == pytest.approx(share, rel=0.01)


@pytest.mark.parametrize("direction", ["orthogonal", "adam", "sign"])
def test_a_compiled_step_is_the_same_and_is_compiled_once(direction):
    torch._dynamo.reset()
    counter = CompileCounter()
    made = []
    for _ in range(2):
        parameters = generators((3, 8), (2, 8), (2, 4))
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
