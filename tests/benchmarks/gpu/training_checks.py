"""A few training steps of a small network on the device against the same steps on the CPU, in fp32."""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from gpu.device import Gpu
from gpu.record import Case
from gpu.training import step_of
from orthotrain.kernels.backend import use_backend
from orthotrain.layers.folding import merge_rotations
from orthotrain.layers.mergeable import mergeable_layers
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
STEPS, LIMIT = 4, 2e-3
"""Steps before the merge, and the largest relative difference of a loss: Adam divides small differences by small."""
RATES = Optimization(lr=1e-3)
TURNING = Optimization(lr=1e-3, rotation_lr=0.015, rotation_optimizer=partial(LieOptimizer, direction="orthogonal"))

Recipe = Callable[[CausalLM], BaseModule]


def poet(**layers: Any) -> Recipe:
    """Return POET with blocks of 64."""
    return lambda model: PoetModule(model, PoetLayers(**{"block_size": 64, **layers}), optimization=RATES)


def stepwise(model: CausalLM) -> BaseModule:
    """Return step-wise POET."""
    layers = PoetLayers(block_size=64, parameterization=CayleyNeumann(2), stepwise=True)
    return PoetModule(model, layers, 1, optimization=TURNING)


RECIPES: dict[str, Recipe] = {
    "AdamW": lambda model: BaseModule(model, RATES),
    "POET": poet(),
    "POET mem": poet(activation_mode="mem"),
    "POET by input": poet(centre="input"),
    "POET by weight": poet(centre="weight"),
    "POET int8": poet(storage="int8"),
    "POET nf4": poet(storage="nf4"),
    "POET residual": poet(storage="residual"),
    "step-wise": stepwise,
    "OFT": lambda model: OftModule(model, OftLayers(block_size=32), RATES),
    "OFT nf4": lambda model: OftModule(model, OftLayers(block_size=32, quantization="nf4"), RATES),
    "LoRA": lambda model: LoraModule(model, LoraLayers(rank=8), optimization=RATES),
}


def cases(machine: Gpu) -> Iterator[Case]:
    """Yield the runs that are compared."""
    for name, recipe in RECIPES.items():
        yield Case(f"training {name}", partial(compared, machine, recipe))


def compared(machine: Gpu, recipe: Recipe) -> dict[str, Any]:
    """Return the losses on both, the last one after a merge, and whether they agree.

    The module is built on the CPU and copied: on the device other values would be drawn.
    """
    torch.manual_seed(0)
    module = recipe(CausalLM(machine.pick(CONFIG, SMALL)))
    module.configure_model()
    twin = copy.deepcopy(module).to(machine.device)
    ids = torch.randint(0, machine.pick(CONFIG, SMALL)["vocab_size"], (4, machine.pick(64, 8)))
    with use_backend("reference"):
        wanted = losses(module, ids)
    with use_backend(machine.pick("auto", "reference")):
        found = losses(twin, ids.to(machine.device))
    error = max(abs(a / b - 1) for a, b in zip(found, wanted, strict=True))
    return {"losses": found, "cpu": wanted, "errors": {"loss": error}, "limit": LIMIT, "right": error <= LIMIT}


def losses(module: BaseModule, ids: torch.Tensor) -> list[float]:
    """Return the loss of each step, and the one after a merge."""
    batch = {"input_ids": ids, "labels": ids.roll(-1, 1)}
    step, optimizer = step_of(module, [batch])
    found = [float(step()) for _ in range(STEPS)]
    merge_rotations(dict(mergeable_layers(module)), [optimizer])
    with torch.no_grad():
        return [*found, float(module.loss(batch))]
