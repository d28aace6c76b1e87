"""A trained factor beside the rotations: its gradient by every route, what folds and exports make of it."""

import copy

import pytest
import torch
from torch import nn

from orthotrain.layers import PoetLinear, PoetSettings, StepwiseLinear, TrainedScale
from orthotrain.layers.poet.route_costs import ROUTES
from orthotrain.layers.spectrum import singular_values

LAYERS = {
    **{f"poet {route}": (PoetLinear, route, {}) for route in ROUTES},
    "poet input, mem": (PoetLinear, "input", {"activation_mode": "mem"}),
    "poet product, mem": (PoetLinear, "product", {"activation_mode": "mem"}),
    "poet one side": (PoetLinear, "input", {"sides": "in"}),
    "step-wise input": (StepwiseLinear, "input", {"stepwise": True}),
    "step-wise weight": (StepwiseLinear, "weight", {"stepwise": True}),
    "step-wise one side": (StepwiseLinear, "weight", {"stepwise": True, "sides": "out"}),
    "step-wise one side, input": (StepwiseLinear, "input", {"stepwise": True, "sides": "in"}),
}


def wrap(name, linear, monkeypatch=None, trained_scale=True, **options):
    kind, route, settings = LAYERS[name]
    settings = {"block_size": 8, "parameterization": "cayley", **settings, **options}
    layer = kind.from_settings(copy.deepcopy(linear), PoetSettings(trained_scale=trained_scale, **settings), 3)
    if monkeypatch is not None:
        monkeypatch.setattr(layer, "_route" if kind is PoetLinear else "_route_for", lambda x: route)
    return layer


def moved(layer, log=0.7):
    """Give the scale a value, and PoetLinear rotations: a step-wise layer computes without."""
    generator = torch.Generator().manual_seed(5)
    for p in layer.rotation_parameters() if isinstance(layer, PoetLinear) else ():
        p.data.normal_(0, 0.1, generator=generator)
    layer.scale.log.data.fill_(log)
    return layer


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_values_and_gradients_are_those_of_a_factor_behind_the_product(name, bias, monkeypatch):
    linear = nn.Linear(37, 23, bias=bias, dtype=torch.float64)
    layer = moved(wrap(name, linear, monkeypatch).double())
    plain = wrap(name, linear, monkeypatch, trained_scale=False).double()
    plain.load_state_dict({key: value for key, value in layer.state_dict().items() if key != "scale.log"})
    plain.bias = None
    log = layer.scale.log.detach().clone().requires_grad_()
    x, same = (torch.sin(torch.arange(6 * 37.0, dtype=torch.float64)).view(2, 3, 37).requires_grad_() for _ in "ab")
    got, want = layer(x), plain(same) * log.exp()
    want = want if linear.bias is None else want + linear.bias
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
    for y in (got, want):
        y.pow(3).sum().backward()
    ours, theirs = [x, layer.scale.log, *layer.rotation_parameters()], [same, log, *plain.rotation_parameters()]
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left.grad, right.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", LAYERS)
def test_a_fold_and_a_merge_leave_it_and_what_is_unwrapped_has_it(name):
    linear = nn.Linear(37, 23)
    layer = moved(wrap(name, linear))
    x = torch.randn(5, 37)
    before, spectrum = layer(x), singular_values(linear.weight)
    torch.testing.assert_close(layer.eval()(x), before)
    torch.testing.assert_close(layer.unwrap()(x), before, rtol=1e-4, atol=1e-5)
    layer.fold_()
    layer.merge_()
    assert layer.scale.log.item() == pytest.approx(0.7) and layer.trained_factor() == pytest.approx(2.0137527)
    assert wrap(name, linear, trained_scale=False).trained_factor() is None
    torch.testing.assert_close(layer(x), before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(singular_values(layer._exact_weight()), spectrum, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(singular_values(layer.merged_weight()), spectrum * 2.0137527, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_is_fp32_in_a_network_of_16_bits_and_trains_under_autocast(name):
    layer = wrap(name, nn.Linear(32, 32), storage="residual")
    x = torch.randn(50, 32)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().square().sum().backward()
    # y is the scaled product and the bias
    expected = (2 * y * (y - layer.bias)).sum().item()
    assert y.dtype == torch.bfloat16 and layer.scale.log.grad.item() == pytest.approx(expected, rel=2e-2)
    layer.bfloat16()
    assert layer.scale.log.dtype == torch.float32 and layer(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["poet input", "step-wise input", "step-wise weight"])
def test_keeps_no_activation_that_is_not_kept_without_it(name, monkeypatch):
    sizes = []
    for trained_scale in (False, True):
        layer = wrap(name, nn.Linear(64, 32, bias=False), monkeypatch, trained_scale)
        kept = {}
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: (kept.setdefault(t.untyped_storage().data_ptr(), t), t)[1], lambda t: t
        )
        x = torch.randn(500, 64, requires_grad=True)
        with hooks:
            y = layer(x)
        sizes.append(sum(t.numel() for t in kept.values() if t.numel() >= 500 * 32))
        y.sum().backward()
    assert sizes[0] == sizes[1] > 0


@pytest.mark.parametrize("name", ["poet input", "poet product", "step-wise input", "step-wise weight"])
def test_compiles_without_graph_breaks(name, monkeypatch):
    torch._dynamo.reset()
    layer = moved(wrap(name, nn.Linear(37, 23), monkeypatch))
    results = []
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        x = torch.ones(50, 37, requires_grad=True)
        y = run(x)
        y.pow(3).sum().backward()
        results.append([y.detach(), x.grad, layer.scale.log.grad, *(p.grad for p in layer.rotation_parameters())])
        layer.zero_grad()
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_is_one_parameter_that_starts_at_a_factor_of_one():
    scale = TrainedScale()
    assert sum(p.numel() for p in scale.parameters()) == 1 and torch.equal(scale(torch.ones(3)), torch.ones(3))
