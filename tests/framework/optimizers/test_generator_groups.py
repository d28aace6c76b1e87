"""What the optimizer of generators takes: which parameters, which angles, and the angle that matches a movement."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from orthotrain.errors import ConfigurationError
from orthotrain.layers import PoetSettings, StepwiseLinear
from orthotrain.layers.rotation.block_rotation import BlockRotation
from orthotrain.modules import Optimization
from orthotrain.optimizers import LieOptimizer
from orthotrain.optimizers.generator_groups import checked_block_size


def rotation(blocks=2, size=4, features=8):
    return BlockRotation(features, size, "cayley", blocks=blocks)


@pytest.mark.parametrize("direction", ["orthogonal", "adam", "sign"])
@pytest.mark.parametrize("alternate", [True, False])
@pytest.mark.parametrize("gradients", ["random", "of a loss"])
@pytest.mark.parametrize(
    ("width", "options"),
    [
        (64, {"block_size": 32}),
        (60, {"block_size": 32}),
        (64, {"fraction": 0.5}),
        (64, {"block_size": 32, "sides": "in"}),
        (64, {"block_size": 64}),
        (64, {"block_size": 16, "fraction_out": 0.25}),
    ],
)
def test_movement_is_that_of_the_weight(direction, alternate, gradients, width, options):
    """Of blocks that know nothing of the weight; gradients of a loss do, and it moves by up to sqrt(2) as much."""
    settings = PoetSettings(stepwise=True, parameterization="cayley", **options)
    layer = StepwiseLinear.from_settings(nn.Linear(width, width, bias=False), settings, 1)
    optimization = Optimization(
        rotation_lr=0.02,
        rotation_optimizer=lambda groups: LieOptimizer(groups, direction=direction, alternate=alternate, movement=1.0),
    )
    optimizer = optimization.configure(nn.Sequential(layer), 10)["optimizer"]
    x, target = torch.randn(256, width), torch.randn(256, width)
    moved = []
    for _ in range(6):
        optimizer.zero_grad()
        (layer(x) - target).square().mean().backward()
        if gradients == "random":
            for p in layer.rotation_parameters():
                p.grad = torch.randn_like(p)
        before = layer.merged_weight().clone()
        optimizer.step()
        layer.fold_()
        moved.append(float((layer.merged_weight() - before).norm() / before.norm()))
    assert all(0.9 < m / 0.02 < (1.1 if gradients == "random" else 2**0.5) for m in moved), moved


def test_the_mark_of_generators_survives_copies_casts_and_assignment():
    (original,) = [rotation()]
    copied = copy.deepcopy(original).double()
    assigned = rotation()
    assigned.load_state_dict(original.state_dict(), assign=True)
    moved = rotation().to("meta").to_empty(device="cpu")
    for module in (original, copied, assigned, moved, rotation().bfloat16()):
        LieOptimizer([module.generators])


def test_what_is_no_generator_is_refused():
    linear = nn.Linear(28, 7, bias=False)  # 28 = 8 * 7 / 2, as wide as a block of 8
    with pytest.raises(ConfigurationError, match=r"takes only generators, not a parameter of shape \(7, 28\)"):
        LieOptimizer(linear.parameters())
    optimizer = LieOptimizer(rotation().parameters())
    with pytest.raises(ConfigurationError, match=r"not a parameter of shape \(3,\): use it as rotation_optimizer"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ConfigurationError, match="use it as rotation_optimizer"):
        LieOptimizer([{"params": rotation().parameters(), "name": "decay"}])
    with pytest.raises(ConfigurationError, match="no block has 7 generators"):
        checked_block_size(7)
    assert checked_block_size(1) == 2 and checked_block_size(2016) == 64


@pytest.mark.parametrize("angle", [0.0, -0.1, 0.2, 3.0, math.nan])
def test_angles_out_of_range_are_refused_wherever_they_come_from(angle):
    refused = pytest.raises(
        ConfigurationError, match=f"an angle of {angle:g} rad a step: take one above 0 and below 0.2"
    )
    with refused:
        LieOptimizer(rotation().parameters(), lr=angle)
    optimizer = LieOptimizer(rotation().parameters())
    with refused:
        optimizer.add_param_group({"params": rotation().parameters(), "lr": angle})
    with refused:
        optimizer.add_param_group({"params": [], "lr": angle})
    if angle:  # a schedule may begin or end at rest
        optimizer.param_groups[0]["lr"] = angle
        with refused:
            optimizer.step()


def test_a_schedule_may_rest_and_not_go_too_far():
    module = rotation()
    optimizer = LieOptimizer(module.parameters(), lr=0.04)
    schedule = LambdaLR(optimizer, lambda step: [0.0, 1.0, 10.0][step])
    for _ in range(2):
        module.generators.grad = torch.randn_like(module.generators)
        optimizer.step()
        schedule.step()
    with pytest.raises(ConfigurationError, match="an angle of 0.4 rad a step"):
        optimizer.step()


def test_large_angles_warn_once():
    with pytest.warns(UserWarning, match="0.04 rad a step is a large angle"):
        optimizer = LieOptimizer(rotation().parameters(), lr=0.04)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        optimizer = LieOptimizer([{"params": rotation().parameters()}, {"params": []}], lr=0.035)
        optimizer.param_groups[0]["lr"] = 0.09
        with pytest.raises(UserWarning, match="0.09 rad"):
            optimizer.step()
        optimizer.step()


def test_a_movement_is_bounded_by_the_angle_that_it_takes():
    module = rotation(blocks=1, size=2)  # a quarter of the width: twice the angle
    LieOptimizer(module.parameters(), lr=0.02, movement=4.9)
    with pytest.raises(ConfigurationError, match=r"an angle of 0.2 rad a step \(lr=0.02 with movement=5\)"):
        LieOptimizer(module.parameters(), lr=0.02, movement=5.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"direction": "up"}, "direction='up'"),
        ({"momentum": 1.0}, "momentum=1.0: take at least 0 and below 1"),
        ({"movement": 0.0}, "movement=0.0: take a positive fraction"),
        ({"weight_decay": 0.1}, "weight_decay must be 0"),
        ({"side": "up"}, "side='up': choose one of in, out, only"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        LieOptimizer([{"params": rotation().parameters(), **options}])
