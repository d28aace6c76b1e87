"""Several optimizers as one: steps, schedules, state and checkpoints are those of the parts."""

import bitsandbytes
import pytest
import torch
from torch import nn

from orthotrain.checkpoints.reading import read_checkpoint
from orthotrain.errors import ConfigurationError
from orthotrain.layers import PoetLinear
from orthotrain.layers.folding import merge_rotations
from orthotrain.modules import Optimization, PoetLayers
from orthotrain.optimizers import CompositeOptimizer, GaLore
from orthotrain.schedules import CosineWithWarmup


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def train(net, optimizer, steps, start=0):
    for step in range(start, start + steps):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()


def parts(net):
    return [torch.optim.SGD(net[0].parameters(), lr=0.1, momentum=0.9), torch.optim.AdamW(net[2].parameters(), lr=0.01)]


def test_steps_like_its_parts():
    together, apart = network(), network()
    train(together, CompositeOptimizer(parts(together)), 5)
    first, second = parts(apart)
    for step in range(5):
        train(apart, first, 0)
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
        apart.zero_grad()
        apart(x).square().mean().backward()
        first.step()
        second.step()
    for a, b in zip(together.parameters(), apart.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_schedule_reaches_every_part():
    net = network()
    optimizer = CompositeOptimizer(parts(net))
    schedule = CosineWithWarmup(optimizer, warmup_steps=0, final_ratio=0.5, total_steps=4)
    for _ in range(4):
        train(net, optimizer, 1)
        schedule.step()
    assert [part.param_groups[0]["lr"] for part in optimizer.parts] == pytest.approx([0.05, 0.005])


def test_state_is_seen_dropped_and_set_where_it_lies():
    net = network()
    optimizer = CompositeOptimizer(parts(net))
    train(net, optimizer, 1)
    assert len(optimizer.state) == 4 and net[0].weight in optimizer.state
    document = optimizer.state_dict()  # numbered like one optimizer of all parameters
    assert [*document["state"]] == [0, 1, 2, 3] and [g["params"] for g in document["param_groups"]] == [[0, 1], [2, 3]]
    optimizer.state.pop(net[2].weight, None)
    assert net[2].weight not in optimizer.parts[1].state
    assert optimizer.state.pop(net[2].weight, None) is None
    optimizer.state[net[2].weight] = {"step": torch.tensor(1.0)}
    assert net[2].weight in optimizer.parts[1].state


@pytest.mark.parametrize("galore", [False, True])
def test_resumes_to_the_same_bits_without_a_pickle(galore, tmp_path):
    def build(net):
        if not galore:
            return CompositeOptimizer(parts(net))
        vectors = [p for p in net.parameters() if p.ndim == 1]
        matrices = [p for p in net.parameters() if p.ndim == 2]
        return CompositeOptimizer([torch.optim.SGD(vectors, lr=0.1), GaLore(matrices, rank=2, update_proj_gap=3)])

    straight = network()
    train(straight, build(straight), 8)
    first = network()
    optimizer = build(first)
    train(first, optimizer, 4)
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "c.ckpt")
    train(first, optimizer, 1, start=4)  # saving has not changed what goes on
    saved = read_checkpoint(tmp_path / "c.ckpt")  # weights_only
    second = network(1)
    resumed = build(second)
    second.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    train(second, resumed, 4, start=4)
    for a, b in zip(straight.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_galore_has_the_defaults_of_its_paper():
    (group,) = GaLore([nn.Parameter(torch.zeros(4, 3))]).param_groups
    expected = {"rank": 128, "update_proj_gap": 200, "scale": 0.25, "betas": (0.9, 0.999), "weight_decay": 0.0}
    assert {name: group[name] for name in expected} == expected


def test_galore_refuses_what_is_no_matrix():
    with pytest.raises(ConfigurationError, match=r"a parameter of shape \(3,\) is none.*optimizer_overrides"):
        GaLore([nn.Parameter(torch.zeros(3))])


def linears():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.LayerNorm(64))


def test_overrides_give_parameters_their_optimizer_rate_and_decay():
    net = linears()
    PoetLayers(block_size=8, include=["0"], exclude=[]).apply_(net)
    optimization = Optimization(
        lr=1e-3,
        rotation_lr=2e-3,
        rotation_lr_scale=0.5,
        rotation_weight_decay=0.2,
        lr_overrides={"2.*": 5e-4},
        weight_decay_overrides={"3.*": 0.3},
        rotation_optimizer=torch.optim.SGD,
        optimizer_overrides={"2.weight": torch.optim.Muon},
    )
    optimizer = optimization.build(optimization.groups(net))
    kinds = [type(part).__name__ for part in optimizer.parts]
    assert kinds == ["SGD", "AdamW", "Muon"]
    sgd, adamw, muon = optimizer.parts
    assert sgd.param_groups[0]["lr"] == 1e-3 and sgd.param_groups[0]["weight_decay"] == 0.2
    assert {id(p) for p in muon.param_groups[0]["params"]} == {id(net[2].weight)}
    assert muon.param_groups[0]["lr"] == 5e-4
    norm = next(g for g in adamw.param_groups if any(p is net[3].weight for p in g["params"]))
    assert norm["weight_decay"] == 0.3 and norm["lr"] == 1e-3


@pytest.mark.parametrize("kind", ["lr_overrides", "weight_decay_overrides", "optimizer_overrides"])
def test_an_override_that_matches_nothing_is_refused(kind):
    value = torch.optim.SGD if kind == "optimizer_overrides" else 0.1
    with pytest.raises(ConfigurationError, match=rf"optimization.{kind} pattern 'x\*' matches no trainable parameter"):
        Optimization(**{kind: {"x*": value}}).groups(linears())


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "8-bit adam": lambda p: bitsandbytes.optim.AdamW8bit(p, lr=1e-2, min_8bit_size=16),
    "composite": lambda p: CompositeOptimizer([torch.optim.AdamW(p[:1], lr=1e-2), torch.optim.AdamW(p[1:], lr=1e-2)]),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_after_a_merge_the_generators_step_as_if_for_the_first_time(name):
    """A merged layer with an old optimizer takes the very step that a fresh optimizer would take on it."""
    torch.manual_seed(0)
    layer = PoetLinear.from_linear(nn.Linear(32, 32), 16, seed=1)
    optimizer = OPTIMIZERS[name]([p for p in layer.parameters() if p.requires_grad])
    x = torch.randn(7, 32)

    def step(layer, optimizer):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()

    for _ in range(3):
        step(layer, optimizer)
    merge_rotations({"layer": layer}, [optimizer])
    fresh = PoetLinear.from_linear(nn.Linear(32, 32), 16, seed=1)
    fresh.load_state_dict(layer.state_dict())
    step(layer, optimizer)
    step(fresh, OPTIMIZERS[name]([p for p in fresh.parameters() if p.requires_grad]))
    for a, b in zip(layer.rotation_parameters(), fresh.rotation_parameters(), strict=True):
        assert a.any() and torch.equal(a, b)
    assert not torch.equal(layer.bias, fresh.bias)  # the bias has kept its state
