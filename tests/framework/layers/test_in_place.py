"""In-place operations on the output of a layer, as nn.Linear allows them, have the gradients of their equals."""

from itertools import product

import pytest
import torch
from torch import nn

from orthotrain.layers import (
    FrozenLinear,
    LoraLinear,
    OftConv2d,
    OftEmbedding,
    OftLinear,
    OftSettings,
    PoetLinear,
    StepwiseLinear,
)
from orthotrain.layers.weights.storage import store


def linear(bias):
    return nn.Linear(64, 64, bias=bias)


def options(**values):
    return [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]


ROUTES = options(route=["input", "weight", "auto"], trained_scale=[False, True], sides=["both", "in", "out"])
KINDS = {
    "oft": (OftLinear.from_linear, [*options(storage=["dense", "int8", "nf4"]), {"rotation_dtype": "float32"}]),
    "poet": (PoetLinear.from_linear, [*ROUTES, {"activation_mode": "mem"}]),
    "poet, stored": (PoetLinear.from_linear,
                     options(storage=["bf16", "residual", "int8", "nf4"], route=["input", "weight"])),
    "stepwise": (StepwiseLinear.from_linear, [*ROUTES, {"storage": "residual", "route": "input"}]),
    "lora": (lambda layer, block_size, **_: LoraLinear.from_linear(layer, 4), [{}]),
    "frozen": (lambda layer, block_size, storage: FrozenLinear(store(layer.weight.detach(), storage), layer.bias),
               options(storage=["dense", "nf4"])),
}  # fmt: skip
IN_PLACE = [
    (lambda y, x: torch.relu_(y), lambda y, x: torch.relu(y)),
    (lambda y, x: y.add_(x), lambda y, x: y + x),
    (lambda y, x: first_row_zero(y), lambda y, x: torch.cat([0 * y[:1], y[1:]])),
]
SHAPES = [(3, 64), (2, 3, 64), (2, 70, 64), (2, 2, 3, 64)]


def first_row_zero(y):
    y[0] = 0
    return y


def turned(layer):
    """The layer with generators of a trained run; step-wise layers have zeros in every forward pass."""
    if not isinstance(layer, StepwiseLinear | FrozenLinear):
        with torch.no_grad():
            for parameter in layer.rotation_parameters():
                parameter.normal_(std=0.05)
    return layer


def results(layer, x, operation):
    layer.zero_grad()
    leaf = x.clone().requires_grad_(x.is_floating_point())
    y = operation(layer(leaf), x.detach())
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    return [y.detach().clone(), leaf.grad, *(p.grad for p in layer.parameters() if p.requires_grad)]


def check(layer, x, operations=IN_PLACE, **tolerance):
    for in_place, out_of_place in operations:
        found, expected = (results(layer, x, operation) for operation in (in_place, out_of_place))
        assert len(found) > 2 or isinstance(layer, FrozenLinear)
        torch.testing.assert_close(found, expected, **{"rtol": 1e-4, "atol": 1e-5, **tolerance})


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_of_linear_layers_may_be_changed(kind, bias):
    make, settings = KINDS[kind]
    for setting in settings:
        layer = turned(make(linear(bias).requires_grad_(kind != "frozen"), 16, **setting))
        for shape in SHAPES:
            check(layer, torch.randn(shape), IN_PLACE if shape == SHAPES[1] else IN_PLACE[:1])
        with torch.autocast("cpu", torch.bfloat16):
            check(layer, torch.randn(2, 3, 64), IN_PLACE[:1], rtol=3e-2, atol=3e-2)


def test_outputs_of_convolutions_and_embeddings_may_be_changed():
    convolution = turned(OftConv2d.from_settings(nn.Conv2d(8, 8, 3, padding=1), OftSettings(4), train_bias=True))
    for layout in (torch.contiguous_format, torch.channels_last):
        check(convolution, torch.randn(2, 8, 4, 4).to(memory_format=layout))
    embedding = turned(OftEmbedding.from_settings(nn.Embedding(9, 8), OftSettings(4)))
    for shape in ((5,), (2, 5), (2, 3, 4)):
        check(embedding, torch.randint(0, 9, shape), [IN_PLACE[0], IN_PLACE[2]])


def test_a_compiled_network_changes_the_outputs_of_its_layers():
    layers = [
        StepwiseLinear.from_linear(linear(False), 16, route="input", trained_scale=True),
        StepwiseLinear.from_linear(linear(False), 16, route="weight"),
        turned(PoetLinear.from_linear(linear(False), 16, route="input")),
        turned(OftLinear.from_linear(linear(True), 16, train_bias=True)),
    ]
    plain = nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh())))
    x = torch.randn(2, 5, 64)
    expected = results(plain, x, lambda y, _: y)

    def changing(x):
        for layer in layers:
            x = layer(x).tanh_()
        return x

    compiled = torch.compile(changing, backend="aot_eager", fullgraph=True)
    plain.forward = compiled
    torch.testing.assert_close(results(plain, x, lambda y, _: y), expected, rtol=1e-4, atol=1e-5)


def test_an_output_that_was_not_changed_is_not_computed_again(monkeypatch):
    layer = StepwiseLinear.from_linear(linear(False), 16, route="input")
    calls = []
    monkeypatch.setattr(layer, "_product", lambda x: calls.append(x) or nn.functional.linear(x, layer.weight.values))
    x = torch.randn(2, 3, 64, requires_grad=True)
    layer(x).sum().backward()
    assert not calls
    layer(x).relu_().sum().backward()
    assert len(calls) == 1
