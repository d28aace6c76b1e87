"""The methods that tests/benchmarks/quality.py compares, each as one training module made of a :class:`Setting`."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from pytorch_optimizer import SOAP, NorMuon
from quality_changes import ChangedPoet, FrontLoaded
from torch import nn
from torch.optim import Optimizer

from orthotrain.layers.poet.initialization import initialize_
from orthotrain.models import CausalLM
from orthotrain.modules import BaseModule, LoraLayers, LoraModule, Optimization, PoetLayers, PoetModule
from orthotrain.optimizers import GaLore, LieOptimizer
from orthotrain.plugins import CayleyNeumann
from orthotrain.schedules import CosineWithWarmup
from orthotrain.seeding import generator

HIDDEN = "*layers*proj*"
VOCABULARY = 2048
NETWORKS = {"0.4M": (128, 2, 2), "1M": (192, 2, 3)}
"""Parameters without embeddings -> width, layers and attention heads. The intermediate size is 3 times the width."""

SPECTRA = {"gaussian": "standard", "normalized": "normalized", "flat": "uniform", "power": "standard"}


@dataclass(frozen=True)
class Setting:
    """One configuration of a method.

    Attributes:
        method: A key of :data:`METHODS`.
        lr: Learning rate of the hidden matrices, of their low-rank updates or generators; for step-wise POET the angle
            of a step in radians.
        rest: Learning rate of embeddings (which are the head too) and norms.
        decay: Weight decay of the hidden matrices. Rotations have none.
        rest_decay: Weight decay of the embeddings.
        floor: Learning rate at the end over the largest one.
        spectrum: Initial hidden matrices: ``gaussian``, ``normalized`` (rows of one norm), ``flat`` (all singular
            values are equal), or ``power-P``: the k-th singular value is proportional to ``k^-P``.
        rms: Root mean square of the entries of the initial hidden matrices.
        residual: Factor of the initial matrices that write into the residual stream.
        block: Features of a block; 0 for blocks as wide as each side of a weight.
        scale: Whether each rotated weight has a trained factor.
        options: Other arguments of the method, as pairs of name and value.
    """

    method: str
    lr: float
    rest: float = 4e-3
    decay: float = 0.01
    rest_decay: float = 0.01
    floor: float = 0.01
    spectrum: str = "gaussian"
    rms: float = 0.02
    residual: float = 1.0
    block: int = 64
    scale: bool = False
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """The method, the rate, and what differs from the defaults."""
        parts = [self.method, f"lr={self.lr:g}"]
        for field in fields(self)[2:-1]:
            value = getattr(self, field.name)
            if value != field.default:
                parts.append(f"{field.name}={value:g}" if isinstance(value, float) else f"{field.name}={value}")
        return " ".join([*parts, *(f"{name}={value}" for name, value in self.options)])


@torch.no_grad()
def started(config: dict[str, Any], setting: Setting, seed: int) -> nn.Module:
    """Build a LLaMA whose hidden matrices have the spectrum and the size of a setting: the same for every method."""
    network = CausalLM(config)()
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear) and "lm_head" not in name:
            kind, _, power = setting.spectrum.partition("-")
            initialize_(layer.weight, SPECTRA[kind], generator(seed, name, "frozen weight"))
            if power:
                left, values, right = torch.linalg.svd(layer.weight, full_matrices=False)
                layer.weight.copy_(left * torch.arange(1, len(values) + 1) ** -float(power) @ right)
            gain = setting.residual if name.endswith(("o_proj", "down_proj")) else 1.0
            layer.weight.mul_(gain * setting.rms / layer.weight.square().mean().sqrt())
    return network


def described(network: str) -> dict[str, Any]:
    """Return the LLaMA configuration of a network of :data:`NETWORKS`."""
    width, layers, heads = NETWORKS[network]
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
    more = {"num_attention_heads": heads, "max_position_embeddings": 256, "tie_word_embeddings": True}
    return {"vocab_size": VOCABULARY, **sizes, **more}


def optimization(setting: Setting, steps: int, **options: Any) -> Optimization:
    """Return what all methods share: AdamW for the rest, a warm-up of 2% of the steps, a cosine."""
    schedule = partial(CosineWithWarmup, warmup_steps=steps // 50, final_ratio=setting.floor)
    build = partial(torch.optim.AdamW, betas=(0.9, 0.95), foreach=True)
    return Optimization(
        lr=setting.rest, weight_decay=setting.rest_decay, optimizer=build, scheduler=schedule, **options
    )


def trained(
    build: Callable[[Iterable], Optimizer] | None, network: Any, setting: Setting, steps: int, seed: int
) -> BaseModule:
    """Return a module that trains all weights; ``build`` makes the optimizer of the hidden matrices."""
    rates = {"lr_overrides": {HIDDEN: setting.lr}, "weight_decay_overrides": {HIDDEN: setting.decay}}
    overrides = {"optimizer_overrides": {HIDDEN: build}} if build else {}
    return BaseModule(network, optimization(setting, steps, **rates, **overrides))


def muon(rule: str) -> Callable[[Iterable], Optimizer]:
    """Return Muon with a rule for the rate of each shape; ``match_rms_adamw`` is the rule of Kimi."""
    return partial(torch.optim.Muon, adjust_lr_fn=rule)


def normuon(groups: Iterable[dict[str, Any]]) -> Optimizer:
    """Return NorMuon, with updates of RMS 0.2."""
    return NorMuon([{**group, "use_muon": True} for group in groups], update_scale="match_rms")


def soap(groups: Iterable[dict[str, Any]]) -> Optimizer:
    """Return SOAP."""
    return SOAP(groups)


def galore(network: Any, setting: Setting, steps: int, seed: int) -> BaseModule:
    """Return GaLore of rank 32: 4 projections in a run, or one each 200 steps."""
    build = partial(GaLore, rank=32, update_proj_gap=min(200, steps // 4), scale=1.0, betas=(0.9, 0.95))
    return trained(build, network, setting, steps, seed)


def lora(network: Any, setting: Setting, steps: int, seed: int) -> LoraModule:
    """Return LoRA pretraining of rank 32."""
    module = LoraModule(network, LoraLayers(rank=32), None, optimization(setting, steps, rotation_lr=setting.lr))
    module.seed = seed
    return module


def layers(setting: Setting, **given: Any) -> PoetLayers:
    """Return POET layers over weights that :func:`started` has made."""
    blocks = {"block_size": setting.block} if setting.block else {"fraction": 1.0}
    return PoetLayers(**{"init": "keep", "trained_scale": setting.scale, **blocks, **given})


def poet(network: Any, setting: Setting, steps: int, seed: int) -> PoetModule:
    """Return POET as published: exact Cayley, Adam on the generators, a merge every 200 steps; BS, or FS of 1/2."""
    given = {"parameterization": "cayley"} | dict(setting.options)
    if "fraction" in given:
        given["block_size"] = None
    rates = optimization(setting, steps, rotation_lr=setting.lr)
    return PoetModule(network, layers(setting, **given), merge_every=200, optimization=rates, seed=seed)


def stepwise(network: Any, setting: Setting, steps: int, seed: int) -> PoetModule:
    """Return step-wise POET; options are arguments of the optimizer, of the layers, or changes."""
    given = dict(setting.options)
    own = {name: given.pop(name) for name in PoetLayers.__dataclass_fields__ if name in given}
    period = given.pop("resample_every", 200)
    changes = {name: given.pop(name) for name in ("diagonal", "moved") if name in given}
    build = partial(FrontLoaded, steps=steps, **given) if "front" in given else partial(LieOptimizer, **given)
    rates = optimization(setting, steps, rotation_lr=setting.lr, rotation_optimizer=build)
    wanted = layers(setting, parameterization=CayleyNeumann(2), stepwise=True, **own)
    module = ChangedPoet(network, wanted, 1, resample_every=period, optimization=rates, seed=seed)
    for name, value in changes.items():
        setattr(module, name, value)
    return module


def pion(network: Any, setting: Setting, steps: int, seed: int) -> PoetModule:
    """Return Pion (arXiv:2605.12492): Adam's moments on the algebra, full width, both sides in each step.

    The rate is that of AdamW: a step of rate 1 changes each weight by an RMS of 0.2.
    """
    given = {"direction": "adam", "alternate": False, "momentum": 0.9, "beta2": 0.95, "nesterov": False}
    build = partial(LieOptimizer, movement=0.2 / setting.rms, **given)
    rates = optimization(setting, steps, rotation_lr=setting.lr, rotation_optimizer=build)
    wanted = layers(setting, parameterization=CayleyNeumann(2), stepwise=True)
    return PoetModule(network, wanted, 1, resample_every=steps, optimization=rates, seed=seed)


METHODS: dict[str, Callable[..., BaseModule]] = {
    "AdamW": partial(trained, None),
    "Muon": partial(trained, muon("original")),
    "Muon-Kimi": partial(trained, muon("match_rms_adamw")),
    "NorMuon": partial(trained, normuon),
    "SOAP": partial(trained, soap),
    "GaLore": galore,
    "LoRA": lora,
    "POET-BS": poet,
    "POET-FS": poet,
    "step-wise": stepwise,
    "Pion": pion,
}


def module_of(setting: Setting, network: str, steps: int, seed: int) -> BaseModule:
    """Return the module of a setting for a run of ``steps`` optimizer steps."""
    build = partial(started, described(network), setting, seed)
    return METHODS[setting.method](build, setting, steps, seed)
