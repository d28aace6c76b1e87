"""A few training steps of a small network on the device against the same steps on the CPU, in fp32."""

import copy
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from gpu.device import Gpu
from gpu.kernel_checks import WRONG
from gpu.recipes import offered
from gpu.record import Case
from gpu.training import step_of
from orthotrain.kernels.dispatch import use_backend
from orthotrain.layers import OftLinear
from orthotrain.layers.folding import merge_rotations
from orthotrain.layers.protocols import mergeable_layers
from orthotrain.models import CausalLM
from orthotrain.modules import (
    BaseModule,
    LoraLayers,
    LoraModule,
    OftLayers,
    OftModule,
    Optimization,
    PoetLayers,
    PoetModule,
)
from orthotrain.optimizers import LieOptimizer
from orthotrain.plugins import CayleyNeumann

CONFIG = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
SMALL = {**CONFIG, "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
STEPS, STEPS_AFTER = 4, 2
"""Steps before and after a merge."""
LIMIT, LIMIT_AFTER = 3e-3, 0.5
"""Largest difference of a loss, in parts of how far the loss has moved. A merge of NF4 rounds at random."""
RATES = Optimization(lr=1e-3)
ROTATING = Optimization(lr=1e-6, rotation_lr=4e-3)
TURNING = Optimization(lr=1e-6, rotation_lr=0.025, rotation_optimizer=partial(LieOptimizer, direction="orthogonal"))
"""Only rotations have a rate that counts, so that the loss depends on the gradients of the rotations."""

Recipe = Callable[[CausalLM], BaseModule]


def poet(**layers: Any) -> Recipe:
    """Return POET with blocks of 64."""
    return lambda model: PoetModule(model, PoetLayers(**{"block_size": 64, **layers}), optimization=ROTATING)


def stepwise(model: CausalLM) -> BaseModule:
    """Return step-wise POET."""
    layers = PoetLayers(block_size=64, parameterization=CayleyNeumann(2), stepwise=True)
    return PoetModule(model, layers, 1, optimization=TURNING)


RECIPES: dict[str, Recipe] = {
    "AdamW": lambda model: BaseModule(model, RATES),
    "POET": poet(),
    "POET mem": poet(activation_mode="mem"),
    "POET by input": poet(route="input"),
    "POET by weight": poet(route="weight"),
    "POET int8": poet(storage="int8"),
    "POET nf4": poet(storage="nf4"),
    "POET residual": poet(storage="residual"),
    "step-wise": stepwise,
    "OFT": lambda model: OftModule(model, OftLayers(block_size=32), ROTATING),
    "OFT nf4": lambda model: OftModule(model, OftLayers(block_size=32, storage="nf4"), ROTATING),
    "LoRA": lambda model: LoraModule(model, LoraLayers(rank=8), optimization=ROTATING),
}


COMPILED = {
    **{f"{name}, cuda-graph": (name, "cuda-graph") for name in ("AdamW", "POET", "step-wise", "OFT")},
    "POET, default": ("POET", "default"),
}
"""Runs that the device also compiles or replays, if modules have the option ``compile``: recipe and mode."""


def cases(machine: Gpu) -> Iterator[Case]:
    """Yield the runs that are compared."""
    for name, recipe in RECIPES.items():
        yield Case(f"training {name}", partial(compared, machine, recipe))
    for name, (recipe, mode) in COMPILED.items() if offered(PoetModule, "compile") else ():
        yield Case(f"training {name}", partial(compared, machine, RECIPES[recipe], mode))


def compared(machine: Gpu, recipe: Recipe, mode: str = "none") -> dict[str, Any]:
    """Return the losses on both, some of them after a merge, and whether they agree.

    The module is built on the CPU and copied to the device, where other random values might be drawn.

    Args:
        machine: Where the copy is trained.
        recipe: Makes the module.
        mode: How the copy is compiled.
    """
    torch.manual_seed(0)
    module = recipe(CausalLM(machine.pick(CONFIG, SMALL)))
    module.configure_model()
    twin = copy.deepcopy(module).to(machine.device)
    if mode != "none":
        twin.micro_step = type(twin.micro_step)(machine.pick(mode, "none"))
    ids = torch.randint(0, machine.pick(CONFIG, SMALL)["vocab_size"], (4, machine.pick(64, 8)))
    with use_backend("reference"):
        wanted = losses(module, ids)
    with use_backend(machine.pick("auto", "reference")):
        found = losses(twin, ids.to(machine.device))
    errors = {"before the merge": apart(found[:STEPS], wanted[:STEPS]) / LIMIT}
    errors["after"] = apart(found[STEPS - 1 :], wanted[STEPS - 1 :]) / LIMIT_AFTER
    right = all(error <= 1 for error in errors.values())
    return {"losses": found, "cpu": wanted, "errors": errors, "limit": 1.0, "right": right}


def apart(found: list[float], wanted: list[float]) -> float:
    """Return the largest difference of two rows of losses, in parts of how far the second has moved."""
    difference = max(abs(a - b) for a, b in zip(found, wanted, strict=True))
    value = difference / max(abs(loss - wanted[0]) for loss in wanted)
    return value if math.isfinite(value) else WRONG


def losses(module: BaseModule, ids: torch.Tensor) -> list[float]:
    """Return the loss of each step; between two of them everything that can be merged is."""
    step, optimizer = step_of(module, [{"input_ids": ids, "labels": ids.roll(-1, 1)}])
    found = [float(step()) for _ in range(STEPS)]
    layers = {name: layer for name, layer in mergeable_layers(module) if not isinstance(layer, OftLinear)}
    merge_rotations(layers, [optimizer])
    return [*found, *(float(step()) for _ in range(STEPS_AFTER))]
