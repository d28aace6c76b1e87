"""Every kind of module on a played device: built, trained, merged and loaded there, with the bits of the CPU."""

import pytest
import torch
from torch import nn

from orthotrain.errors import TrainingDiverged
from orthotrain.layers.folding import fold_rotations, merge_rotations
from orthotrain.layers.oft.oft_conv2d import OftConv2d
from orthotrain.layers.oft.oft_embedding import OftEmbedding
from orthotrain.layers.oft.oft_layer import OftSettings
from orthotrain.layers.protocols import mergeable_layers
from orthotrain.layers.rotation.block_rotation import BlockRotation
from orthotrain.modules import LoraLayers, LoraModule, OftLayers, OftModule, PoetLayers, PoetModule
from orthotrain.optimizers import LieOptimizer

POET = {
    "blocks": {"block_size": 8},
    "fraction": {"fraction": 0.5},
    "one side": {"block_size": 8, "sides": "in"},
    "aligned": {"block_size": 8, "aligned": "out"},
    "mem": {"block_size": 8, "activation_mode": "mem"},
    "by input": {"block_size": 8, "route": "input"},
    "by weight": {"block_size": 8, "route": "weight"},
    "bf16": {"block_size": 8, "storage": "bf16"},
    "residual": {"block_size": 8, "storage": "residual"},
    "int8": {"block_size": 8, "storage": "int8", "group_size": 16, "anchor_every": 2},
    "nf4": {"block_size": 8, "storage": "nf4"},
    "trained scale": {"block_size": 8, "trained_scale": True},
    "exponential": {"block_size": 8, "parameterization": "exponential"},
    "cayley": {"block_size": 8, "parameterization": "cayley"},
    **{init: {"block_size": 8, "init": init} for init in ("uniform", "xavier", "standard", "keep")},
    "stepwise": {"block_size": 8, "stepwise": True},
    "stepwise residual": {"block_size": 8, "stepwise": True, "storage": "residual"},
}
OFT = {
    "dense": {"block_size": 8},
    "nf4": {"block_size": 8, "storage": "nf4"},
    "int8": {"block_size": 8, "storage": "int8", "group_size": 16},
    "shared": {"block_size": 8, "block_share": True},
    "dropout": {"block_size": 8, "block_dropout": 0.5},
    "fp32 rotation": {"block_size": 8, "rotation_dtype": "float32"},
}
CASES = {
    **{f"POET, {name}": (PoetModule, PoetLayers, settings) for name, settings in POET.items()},
    **{f"OFT, {name}": (OftModule, OftLayers, settings) for name, settings in OFT.items()},
    "LoRA": (LoraModule, LoraLayers, {"rank": 4}),
}

ROUNDED = ("POET, by weight", "POET, int8", "POET, nf4")
"""On the CPU the route by weight sums its products in parts, and a decomposition reads another layout."""


def train(module, batches, wrap, raw):
    """Take three steps of gradient descent with a merge after each; return losses and the state."""
    losses = []
    for batch in batches:
        loss = module.loss({name: wrap(value) for name, value in batch.items()})
        loss.backward()
        losses.append(raw(loss.detach()).clone())
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter.sub_(0.05 * parameter.grad)
                    parameter.grad = None
        if not isinstance(module, OftModule):
            for _, layer in mergeable_layers(module):
                layer.merge_()
    return losses, {name: raw(value).clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("case", CASES)
def test_a_module_trains_there_as_on_the_cpu(played, network, case):
    module, layers, settings = CASES[case]
    ids = torch.randint(0, 96, (3, 2, 13), generator=torch.Generator().manual_seed(1))
    batches = [{"input_ids": rows[:, :-1], "labels": rows[:, 1:]} for rows in ids]

    def build():
        period = {"merge_every": 1} if module is PoetModule else {}
        return module(network, layers(**settings), **period)

    torch.manual_seed(0)
    here = build()
    here.configure_model()
    torch.manual_seed(0)
    there = build()
    with played.Mode(), torch.device("played"):
        there.configure_model()
    assert {p.device.type for p in there.parameters()} == {"played"}
    torch.manual_seed(2)
    expected, expected_state = train(here, batches, lambda value: value, played.raw)
    torch.manual_seed(2)
    with played.Mode():
        losses, state = train(there, batches, played.batch, played.raw)
    bound = {"rtol": 1e-5, "atol": 1e-6} if case in ROUNDED else {"rtol": 0, "atol": 0}
    torch.testing.assert_close([*losses, *state.values()], [*expected, *expected_state.values()], **bound)


@pytest.mark.parametrize("kind", ["conv", "embedding"])
def test_a_layer_of_its_own_trains_and_unwraps_there_as_on_the_cpu(played, kind):
    def step(wrap):
        torch.manual_seed(0)
        with torch.device("cpu" if wrap is None else "played"):
            if kind == "conv":
                layer, x = (
                    OftConv2d.from_settings(nn.Conv2d(8, 6, 3, padding=1, stride=2), OftSettings(4), train_bias=True),
                    X,
                )
            else:
                layer, x = OftEmbedding.from_settings(nn.Embedding(10, 8), OftSettings(4)), INDICES
        x = x if wrap is None else wrap(x)
        with torch.no_grad():
            for parameter in layer.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1)
        y = layer(x)
        y.square().sum().backward()
        gradients = [p.grad for p in layer.parameters() if p.requires_grad]
        return [played.raw(t.detach()) for t in (y, *gradients, *layer.unwrap().state_dict().values())]

    expected = step(None)
    with played.Mode():
        found = step(played.batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


X = torch.randn(2, 8, 6, 5, generator=torch.Generator().manual_seed(3))
INDICES = torch.tensor([[0, 3, 9], [3, 3, 1]])


def test_the_side_that_rests_is_known_without_a_look(played, network):
    module = PoetModule(network, PoetLayers(block_size=8, stepwise=True), merge_every=1)
    with played.Mode(), torch.device("played"):
        module.configure_model()
    rotations = [r for r in module.modules() if isinstance(r, BlockRotation)]
    groups = [
        {"params": [layer.get_submodule(f"rotation_{side}").generators for _, layer in mergeable_layers(module)],
         "side": side} for side in ("out", "in")
    ]  # fmt: skip
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    with played.Mode():
        moved = []
        optimizer = LieOptimizer(groups, lr=0.01)
        fold_rotations(dict(mergeable_layers(module)))
        for _ in range(3):
            optimizer.step()
            played.WAITS.clear()
            moved.append([rotation.moved() for rotation in rotations])
            if len(moved) < 3:
                fold_rotations(dict(mergeable_layers(module)))
        # of each layer first the input side and then the output side; output sides begin
        assert moved == [[False, True] * 2, [True, False] * 2, [False, True] * 2]
        with torch.no_grad():
            rotations[0].generators.add_(1)
        assert rotations[0].moved()  # other code has changed generators that the optimizer had left unchanged
        fold_rotations(dict(mergeable_layers(module)))
        assert all(rotation.moved() for rotation in rotations)  # no optimizer has marked the generators since
        assert not played.WAITS


def test_a_count_is_read_again_after_somebody_else_has_changed_it(played, network):
    module = PoetModule(network, PoetLayers(block_size=8), merge_every=1)
    with played.Mode(), torch.device("played"):
        module.configure_model()
    (_, layer), _ = mergeable_layers(module)
    with played.Mode():
        layer.read_counts()
        state = {name: value.clone() for name, value in layer.state_dict().items()}
        for expected in (1, 2):
            played.WAITS.clear()
            layer.merge_()
            assert int(played.raw(layer.merge_count)) == expected
            assert played.WAITS == {"aten::_local_scalar_dense": 1}  # whether the weight is finite
        permutation = played.raw(layer.rotation_in.permutation).clone()
        layer.load_state_dict(state)
        for _ in range(2):
            layer.merge_()
        assert torch.equal(played.raw(layer.rotation_in.permutation), permutation)


@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_rotations_that_are_not_finite_are_left_out_and_found_later(played, network, value):
    module = PoetModule(network, PoetLayers(block_size=8, stepwise=True), merge_every=1)
    with played.Mode(), torch.device("played"):
        module.configure_model()
    (_, layer), _ = mergeable_layers(module)
    before = played.raw(layer.weight.values).clone()
    with played.Mode(), torch.no_grad():
        layer.rotation_in.generators[0, 0] = value
        layer.read_counts()
        played.WAITS.clear()
        layers = {"down": layer}
        checks = merge_rotations(layers, []) if value > 0 else fold_rotations(layers)
        assert not played.WAITS
        assert torch.equal(played.raw(layer.weight.values), before)
        with pytest.raises(TrainingDiverged, match="^down: the rotations of a weight .* were not folded"):
            checks.raise_errors()
