"""Replayed steps: changing shapes, memory that moves, cleared gradients, and errors."""

from collections import UserDict

import pytest
import torch
from torch import nn

from orthotrain.errors import ConfigurationError
from orthotrain.modules import graph_replay
from orthotrain.modules.graph_replay import WARM_UP, GraphedStep


class Regression(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.unused = nn.Linear(4, 3), nn.Linear(2, 2)
        self.register_buffer("shift", torch.zeros(3))
        self.calls = 0

    def loss(self, batch):
        self.calls += 1
        return (self.layer(batch["x"]) + self.shift - batch["more"][0]).square().mean() * batch["factor"]


def batch(rows=5, factor=1.0):
    return {"x": torch.randn(rows, 4), "more": [torch.randn(rows, 3)], "factor": factor}


class Pair:
    """The same network twice, eager and replayed, with the same batches."""

    def __init__(self):
        torch.manual_seed(0)
        self.eager, self.module = Regression(), Regression()
        self.module.load_state_dict(self.eager.state_dict())
        self.step = GraphedStep(self.module.loss, self.module)

    def check(self, batch):
        expected, loss = self.eager.loss(batch), self.step(batch)
        (expected / 2).backward()
        (loss / 2).backward()
        assert torch.equal(loss, expected)
        self.check_gradients()

    def check_gradients(self):
        for one, other in zip(self.eager.parameters(), self.module.parameters(), strict=True):
            assert (one.grad is None) == (other.grad is None)
            assert one.grad is None or torch.equal(one.grad, other.grad)

    def both(self, act):
        for module in (self.eager, self.module):
            act(module)


@pytest.fixture
def pair(played_graphs):
    pair = Pair()
    for _ in range(WARM_UP + 1):
        pair.check(batch())
    assert pair.step.captures == 1
    pair.module.calls = 0
    return pair


def test_gradients_of_batches_add_up_and_what_is_unused_has_none(pair):
    for _ in range(3):
        pair.check(batch())
    pair.both(lambda module: module.zero_grad(set_to_none=False))
    pair.check(batch())
    assert pair.module.unused.weight.grad is None and pair.module.calls == 0


def test_changes_in_place_are_seen_by_the_next_replay(pair):
    for change in (lambda m: m.layer.weight.data.mul_(2), lambda m: m.shift.add_(1.0)):
        pair.both(change)
        pair.check(batch())
    assert pair.module.calls == 0


def replaced(module):
    module.layer.weight.data = module.layer.weight.data * 3


def frozen(module):
    module.layer.bias.requires_grad_(False)


@pytest.mark.parametrize(
    "change",
    [replaced, frozen, lambda m: m.zero_grad(), lambda m: setattr(m, "shift", m.shift + 1)],
    ids=["a parameter", "what is trained", "gradients", "a buffer"],
)
def test_memory_that_has_moved_is_captured_anew(pair, change):
    pair.both(change)
    for _ in range(WARM_UP + 2):
        pair.check(batch())
    assert pair.step.captures == 2


def test_every_set_of_shapes_and_values_has_a_graph_up_to_a_number(pair, monkeypatch):
    monkeypatch.setattr(graph_replay, "MOST_SHAPES", 3)
    kinds = [{"rows": 5}, {"rows": 2}, {"factor": 0.5}, {"rows": 3}]
    for _ in range(WARM_UP + 2):
        for kind in kinds:
            pair.check(batch(**kind))
    assert pair.step.captures == 3
    pair.module.calls = 0
    for kind in kinds:
        pair.check(batch(**kind))
    assert pair.module.calls == 1


def test_values_that_never_come_again_are_not_remembered_without_end(pair, monkeypatch):
    monkeypatch.setattr(graph_replay, "MOST_SEEN", 4)
    for number in range(20):
        pair.check(batch(factor=1.0 + number))
    assert len(pair.step._seen) <= 4 and pair.step.captures == 1


def test_a_backward_that_comes_too_late_is_refused(pair):
    first, second = pair.step(batch()), pair.step(batch())
    with pytest.raises(ConfigurationError, match=r"backward\(\) of an earlier batch"):
        first.backward()
    second.backward(retain_graph=True)
    with pytest.raises(ConfigurationError, match=r"backward\(\) of an earlier batch"):
        second.backward()


def test_a_batch_that_is_no_nesting_of_tensors_is_refused(pair):
    class Batch(UserDict):
        """A batch as the tokenizers of transformers return it."""

    with pytest.raises(ConfigurationError, match="a batch holds a Batch, whose tensors a replay would not see"):
        pair.step(Batch(batch()))


def test_gradients_that_are_dropped_before_a_capture_are_refused(played_graphs):
    pair = Pair()
    for _ in range(WARM_UP):
        pair.step(batch()).backward()
        pair.module.zero_grad(set_to_none=True)
    with pytest.raises(ConfigurationError, match="the gradient of layer.weight was dropped"):
        pair.step(batch())


def test_a_parameter_that_only_some_batches_use_is_refused(played_graphs):
    module = Regression()

    def loss(given):
        return module.loss(given) + (module.unused.weight.sum() if len(given["x"]) > 4 else 0.0)

    step = GraphedStep(loss, module)
    step(batch(5)).backward()
    for _ in range(WARM_UP):
        step(batch(3)).backward()
    with pytest.raises(ConfigurationError, match="unused.weight has no part in the loss of this batch"):
        step(batch(3))


def test_a_loss_that_waits_for_its_device_is_refused_by_name(played_graphs):
    module = Regression()
    step = GraphedStep(lambda batch: module.loss(batch) * float(batch["x"].sum()), module)
    for _ in range(WARM_UP):
        step(batch()).backward()
    with pytest.raises(
        ConfigurationError, match=r"compile=cuda-graph: the loss of Regression cannot be .*capturing.*item"
    ):
        step(batch())


def test_casts_of_autocast_are_part_of_the_graph(pair):
    pair.step._graphs.clear()
    pair.step._seen.clear()
    for _ in range(WARM_UP + 2):
        pair.both(lambda module: module.layer.weight.data.mul_(1.5))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            pair.check(batch())
    assert pair.step.captures == 2 and pair.module.calls == WARM_UP + 1
