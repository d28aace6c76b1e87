"""The networks and methods of stages 5 and 6: modules by name, from the shipped configs."""

import functools
import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from gpu.device import Gpu
from orthotrain.models import CausalLM
from orthotrain.modules import BaseModule, OftLayers, OftModule, Optimization, PoetLayers, PoetModule
from orthotrain.optimizers import LieOptimizer
from orthotrain.plugins import CayleyNeumann

CONFIGS = Path(__file__).parents[3] / "configs" / "pretrain"
TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
"""Sizes of a network in a rehearsal."""
HIDDEN = "*layers*proj*"
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

Recipe = Callable[[], BaseModule]


@functools.cache
def shipped(config: str) -> dict[str, Any]:
    """Return the settings of the network of a shipped config."""
    document = yaml.safe_load((CONFIGS / config).read_text(encoding="utf-8"))
    return document["model"]["init_args"]["model"]["init_args"]


def network(machine: Gpu, config: str, **options: Any) -> CausalLM:
    """Return what builds the network of a shipped config, or a tiny one in a rehearsal."""
    sizes = {**shipped(config)["config"], **machine.pick({}, TINY)}
    return CausalLM(sizes, **options)


def rates(**options: Any) -> Optimization:
    """Return AdamW on everything, in one kernel a step, unless told otherwise."""
    return Optimization(**{"lr": 1e-4, "optimizer": partial(torch.optim.AdamW, fused=True), **options})


def poet(machine: Gpu, build: Any, optimization: Optimization | None = None, extra: Any = None, **layers: Any) -> Any:
    """Return POET as the large configs have it: blocks of 256, order 4.

    Args:
        machine: Says how small a rehearsal is.
        build: Builds the network.
        optimization: Optimizer and rates.
        extra: More arguments of the module.
        layers: More settings of the layers.
    """
    settings = {"block_size": machine.pick(256, 16), "parameterization": CayleyNeumann(4), **layers}
    return PoetModule(build, PoetLayers(**settings), optimization=optimization or rates(), **(extra or {}))


def stepwise(machine: Gpu, build: Any, extra: Any = None) -> Any:
    """Return step-wise POET as pretrain/llama_1.3b.yaml has it."""
    size = machine.pick(128, 16)
    layers = PoetLayers(size, parameterization=CayleyNeumann(2), stepwise=True, storage="residual")
    turning = rates(rotation_lr=0.025, rotation_optimizer=partial(LieOptimizer, direction="orthogonal"))
    return PoetModule(build, layers, 1, resample_every=200, optimization=turning, **(extra or {}))


def by_peft(machine: Gpu, build: CausalLM, kind: str) -> BaseModule:
    """Return PEFT's OFT or LoRA of all projections over a frozen network."""
    import peft

    if kind == "OFT":
        series = {"use_cayley_neumann": True, "num_cayley_neumann_terms": 6}
        config: Any = peft.OFTConfig(oft_block_size=machine.pick(32, 8), target_modules=LINEARS, **series)
    else:
        config = peft.LoraConfig(r=16, target_modules=LINEARS)

    def wrapped() -> nn.Module:
        base = build()
        base.config.use_cache = False
        return peft.get_peft_model(base.requires_grad_(False), config)

    return BaseModule(wrapped, rates())


def methods(machine: Gpu) -> dict[str, Recipe]:
    """Return the modules that train the 1.3B network in a plain loop, by name."""
    build = partial(network, machine, "paper/poet_llama_1.3b.yaml")
    muon = {HIDDEN: partial(torch.optim.Muon, adjust_lr_fn="match_rms_adamw")}
    return {
        "AdamW": lambda: BaseModule(build(), rates()),
        "POET": lambda: poet(machine, build()),
        "step-wise": lambda: stepwise(machine, build()),
        "POET mem": lambda: poet(machine, build(), activation_mode="mem"),
        "OFT": lambda: OftModule(build(), OftLayers(block_size=machine.pick(32, 8)), rates()),
        "PEFT OFT": lambda: by_peft(machine, build(), "OFT"),
        "LoRA": lambda: by_peft(machine, build(), "LoRA"),
        "Muon": lambda: BaseModule(build(), rates(optimizer_overrides=muon)),
    }


def offered(module: type, name: str) -> bool:
    """Tell whether a module has an option of that name; earlier versions of this package have fewer."""
    return name in inspect.signature(module).parameters


def trained(machine: Gpu) -> dict[str, Recipe]:
    """Return the modules that Lightning's trainer trains, by name, with every mode of ``compile`` if there is one."""
    build = partial(network, machine, "paper/poet_llama_1.3b.yaml")
    found: dict[str, Recipe] = {
        "POET, trainer": lambda: poet(machine, build()),
        "step-wise, trainer": lambda: stepwise(machine, build()),
        "AdamW, trainer": lambda: BaseModule(build(), rates()),
    }
    if offered(PoetModule, "compile"):
        replayed = {"compile": machine.pick("cuda-graph", "none")}
        found |= {
            "POET, trainer, cuda-graph": lambda: poet(machine, build(), extra=replayed),
            "step-wise, trainer, cuda-graph": lambda: stepwise(machine, build(), replayed),
            "AdamW, trainer, cuda-graph": lambda: BaseModule(build(), rates(), **replayed),
        }
        for mode in ("default", "reduce-overhead"):
            extra = {"compile": machine.pick(mode, "none")}
            found[f"POET, trainer, {mode}"] = partial(poet, machine, build(), extra=extra)
    return found
