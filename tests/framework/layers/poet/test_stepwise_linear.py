"""The layer that folds every step: a plain product forward, POET's gradients, exact folds in long runs."""

import copy

import pytest
import torch
from torch import nn

from orthotrain.errors import ConfigurationError, TrainingDiverged
from orthotrain.layers import Mergeable, PoetLinear, PoetSettings, StepwiseLinear, initialize_
from orthotrain.layers.poet.cost_tables import Costs
from orthotrain.layers.protocols import Foldable
from orthotrain.layers.spectrum import singular_values
from orthotrain.layers.weights.bf16_weight import Bf16Weight

VARIANTS = {
    "both": {"block_size": 8},
    "in": {"block_size": 8, "sides": "in"},
    "out": {"block_size": 8, "sides": "out"},
    "fs": {"fraction": 0.5},
    "in aligned": {"block_size": 8, "aligned": "in"},
    "tails": {"block_size": 5, "block_size_out": 7},
}


def wrap(linear, seed=3, **options):
    return StepwiseLinear.from_linear(
        copy.deepcopy(linear), seed=seed, **{"parameterization": "cayley_neumann", **options}
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("route", ["input", "weight", "auto"])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_plain_layer_and_gradients_are_poets_at_zero(variant, route, bias):
    linear = nn.Linear(37, 23, bias=bias, dtype=torch.float64)
    options = VARIANTS[variant]
    layer = wrap(linear, route=route, **options)
    poet = PoetLinear.from_linear(copy.deepcopy(linear), seed=3, **options)
    assert isinstance(layer, Mergeable) and isinstance(layer, Foldable)
    results = []
    for module in (layer, poet):
        x = torch.randn(4, 6, 37, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = module(x)
        torch.testing.assert_close(y, linear(x))
        y.pow(3).sum().backward()
        results.append([x.grad, *(p.grad.double() for p in module.rotation_parameters())])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_fold_is_the_merge_of_the_poet_layer(variant, randomize):
    linear = nn.Linear(37, 23)
    layer = randomize(wrap(linear, **VARIANTS[variant]))
    poet = randomize(PoetLinear.from_linear(copy.deepcopy(linear), seed=3, **VARIANTS[variant]))
    torch.testing.assert_close(layer.merged_weight(), poet.merged_weight())
    drawn = [rotation for _, rotation in layer.sides() if rotation.permutation is not None]
    orders = [rotation.permutation.clone() for rotation in drawn]
    layer.fold_()
    torch.testing.assert_close(layer.merged_weight(), poet.merged_weight())
    assert not any(p.any() for p in layer.rotation_parameters())
    assert all(torch.equal(r.permutation, order) for r, order in zip(drawn, orders, strict=True))
    layer.merge_()
    assert not any(torch.equal(r.permutation, order) for r, order in zip(drawn, orders, strict=True))
    torch.testing.assert_close(layer.unwrap()(torch.ones(2, 37)), poet(torch.ones(2, 37)))


@pytest.mark.parametrize("storage", ["dense", "residual"])
def test_trains_in_bf16_autocast(storage):
    layer = wrap(nn.Linear(32, 32), block_size=8, storage=storage)
    x = torch.randn(5, 32)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in layer.rotation_parameters())


@pytest.mark.parametrize("route", ["input", "weight", "auto"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_weight_with_a_residual_takes_the_route_that_is_asked_for(route, autocast, monkeypatch):
    linear = nn.Linear(37, 23)
    layer = wrap(linear, block_size=8, storage="residual", route=route)
    dense = wrap(layer.unwrap(), block_size=8, route="input")
    taken = []
    for way in ("_through_weight", "_through_activations"):
        original = getattr(StepwiseLinear, way)
        record = lambda self, *a, way=way, original=original: (taken.append(way), original(self, *a))[1]  # noqa: E731
        monkeypatch.setattr(StepwiseLinear, way, record)
    results = []
    for module in (layer, dense):
        x = torch.randn(50, 37, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = module(x)
        y.float().pow(3).sum().backward()
        results.append([y.detach().float(), x.grad, *(p.grad for p in module.rotation_parameters())])
        if module is layer and route != "auto":
            assert set(taken) == {"_through_weight" if route == "weight" else "_through_activations"}
    for got, want in zip(*results, strict=True):
        # bf16 rounds products, and what they are contracted to, to 8 bits
        assert (got - want).norm() <= (3e-2 if autocast else 1e-5) * want.norm()


def test_auto_takes_the_cheaper_route_of_any_weight(monkeypatch):
    """Few tokens: a fold is dear beside the contraction of activations; many: the other way round."""
    costs = Costs(1, 0, 0, rotate_column=10, fold_call=1e9, fold_element=0, fold_column=0)
    monkeypatch.setattr("orthotrain.layers.poet.stepwise_linear.costs_for", lambda *_: costs)
    for storage in ("dense", "residual"):
        layer = wrap(nn.Linear(64, 64), block_size=64, storage=storage)
        cheaper = [layer._route_for(torch.empty(tokens, 64)) for tokens in (1, 10**6)]
        assert cheaper == ["input", "weight"]


def test_what_is_kept_for_backward_is_no_copy_of_the_weight():
    layer = wrap(nn.Linear(64, 64), block_size=16, storage="residual", route="weight")
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t)
    with torch.autocast("cpu", torch.bfloat16), hooks:
        layer(torch.randn(5, 64))
    assert any(t.data_ptr() == layer.weight.values.data_ptr() for t in kept)


@pytest.mark.parametrize("storage", ["dense", "residual"])
@pytest.mark.parametrize("route", ["input", "weight"])
def test_compiles_without_graph_breaks(storage, route):
    torch._dynamo.reset()
    layer = wrap(nn.Linear(37, 23), block_size=8, storage=storage, route=route)
    results = []
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        x = torch.randn(50, 37, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = run(x)
        y.pow(3).sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in layer.rotation_parameters())])
        layer.zero_grad()
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_movement_is_seen_below_a_last_place_of_bf16():
    layer = wrap(nn.Linear(64, 64, bias=False, dtype=torch.bfloat16), block_size=16, parameterization="cayley")
    for p in layer.rotation_parameters():
        direction = torch.randn(p.shape)
        p.data.copy_(direction * 1e-4 / (2**0.5 * direction.norm(dim=1, keepdim=True) / 4))
    # 1e-4 rad of Q on both sides rotate by twice that on each
    assert float(layer.movement()) == pytest.approx(2e-4 * 2**0.5, rel=0.1)


def test_weights_that_are_too_coarse_or_anchored_are_refused():
    message = "rounding it at each of thousands of folds moves its singular values; take storage: residual"
    with pytest.raises(ConfigurationError, match=f"stepwise with storage='bf16': {message}"):
        PoetSettings(stepwise=True, storage="bf16")
    for options in ({"storage": "int8"}, {"storage": "nf4"}, {"anchor_every": 4}):
        with pytest.raises(ConfigurationError, match="take dense or residual, and no anchor"):
            PoetSettings(stepwise=True, **options)
    wrap(nn.Linear(32, 32), block_size=8, storage="residual").bfloat16().check_storage("model.0")
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(ConfigurationError, match=f"model.0: stepwise with a weight in {dtype}: {message}"):
            wrap(nn.Linear(32, 32), block_size=8).to(dtype).check_storage("model.0")
    layer = wrap(nn.Linear(32, 32), block_size=8)
    layer.weight = Bf16Weight(layer.weight.values)
    with pytest.raises(ConfigurationError, match=message):
        layer.check_storage("model.0")


def small_folds(make, storage, dtype, angle=1e-3):
    """Return how far 100 folds in one direction get of the way that exact arithmetic goes."""
    linear = nn.Linear(64, 64, bias=False)
    initialize_(linear.weight, "normalized", torch.Generator().manual_seed(0))
    options = {"block_size": 16, "seed": 3, "parameterization": "cayley"}
    layer = make.from_linear(copy.deepcopy(linear).to(dtype), storage=storage, **options)
    exact = make.from_linear(linear.double(), **options)
    start = exact.merged_weight().clone()
    direction = [torch.randn(p.shape, dtype=torch.float64) for p in exact.rotation_parameters()]
    for d in direction:
        d *= angle / (2 * d.norm(dim=1, keepdim=True) / 16**0.5)
    for _ in range(100):
        for module in (layer, exact):
            for p, d in zip(module.rotation_parameters(), direction, strict=True):
                p.data.copy_(d)
            module.fold_()
    way = exact.merged_weight() - start
    done = layer._effective_weight().double() - start
    return float((way * done).sum() / way.square().sum())


@pytest.mark.parametrize(
    ("make", "storage", "dtype", "within"),
    [
        (StepwiseLinear, "dense", torch.float32, 1e-3),
        (StepwiseLinear, "residual", torch.float32, 1e-3),
        (StepwiseLinear, "residual", torch.bfloat16, 1e-3),
        (PoetLinear, "residual", torch.bfloat16, 1e-3),
        (PoetLinear, "dense", torch.bfloat16, 2e-2),
        (PoetLinear, "bf16", torch.float32, 2e-2),
        (PoetLinear, "int8", torch.bfloat16, 5e-2),
    ],
)
def test_small_angles_do_not_vanish(make, storage, dtype, within):
    """Folds of 1e-3 rad are below half a last place of bf16: only unbiased rounding, or a residual, keeps them."""
    assert small_folds(make, storage, dtype) == pytest.approx(1, abs=within)


# relative to the first singular value, after 2,000 folds of 0.01 rad; tests/benchmarks/folding.py has 10,000
@pytest.mark.slow
@pytest.mark.parametrize(("storage", "bound"), [("dense", 1e-5), ("residual", 1e-3)])
def test_many_folds_keep_the_spectrum(storage, bound):
    linear = nn.Linear(48, 64, bias=False)
    layer = wrap(linear, block_size=16, parameterization="cayley", storage=storage)
    start = singular_values(linear.weight)
    for step in range(2000):
        for p in layer.rotation_parameters():
            nn.init.normal_(p, std=0.01 / 16**0.5)
        (layer.merge_ if step % 100 == 99 else layer.fold_)()
    assert (singular_values(layer._effective_weight()) - start).abs().max() / start[0] < bound


def test_reloads_bit_for_bit(randomize):
    layer = randomize(wrap(nn.Linear(37, 23), block_size=8, storage="residual"))
    layer.merge_()
    other = wrap(nn.Linear(37, 23), block_size=8, storage="residual")
    other.load_state_dict(layer.state_dict())
    randomize(layer)
    randomize(other)
    layer.merge_()
    other.merge_()
    assert torch.equal(other.merged_weight(), layer.merged_weight())
    assert torch.equal(other.rotation_in.permutation, layer.rotation_in.permutation)


@pytest.mark.parametrize("storage", ["dense", "residual"])
@pytest.mark.parametrize("moved", ["in", "out", None])
def test_a_side_at_rest_is_left_out_of_the_fold(storage, moved, randomize):
    layer = randomize(wrap(nn.Linear(37, 23), block_size=8, storage=storage, parameterization="cayley"))
    for side, rotation in layer.sides():
        if side != moved:
            rotation.reset_()
    rotations, exact = layer.rotations, layer.weight.dequantize(torch.float32)
    expected = rotations.fold(rotations.framed(exact), *rotations.displacements(torch.float32))
    kept = layer.merged_weight()
    torch.testing.assert_close(layer._effective_weight(), expected, rtol=1e-6, atol=1e-7)
    layer.fold_()
    torch.testing.assert_close(kept.float(), expected.detach(), rtol=1e-2, atol=1e-2)
    if moved is None:
        assert torch.equal(layer.weight.dequantize(torch.float32), exact)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("how", ["fold_", "merge_"])
def test_rotations_that_are_not_finite_are_not_folded(value, how):
    layer = wrap(nn.Linear(24, 16), block_size=8)
    with torch.no_grad():
        layer.rotation_out.generators[0, 0] = value
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with pytest.raises(TrainingDiverged, match=r"the rotations of a weight \(16 x 24\) hold NaN, infinite or huge"):
        getattr(layer, how)()
    torch.testing.assert_close(dict(layer.state_dict()), before, rtol=0, atol=0, equal_nan=True)
