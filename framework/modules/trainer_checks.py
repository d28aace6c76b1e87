"""Refusing what a trainer would do to a module wrongly: callbacks that change weights behind it, and half precision."""

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import nn
from torch.optim import Optimizer

from orthotrain.callbacks.merge_rotations import merging_of
from orthotrain.callbacks.project_generators import ProjectGenerators
from orthotrain.errors import ConfigurationError
from orthotrain.modules.attached_callbacks import given_callbacks

SMALLEST_HALF = 2.0**-24
"""The smallest positive number of fp16."""

REFUSED: dict[type[L.Callback], str] = {
    StochasticWeightAveraging: "it copies the module before its network is built or changed, and "
    "would average other weights: leave it out, and let a schedule lower the learning rate (optimization.scheduler)",
    WeightAveraging: "it averages generators, permutations and quantized weights number by number, which gives no "
    "average of networks: leave it out, and let a schedule lower the learning rate (optimization.scheduler)",
    ModelPruning: "it masks frozen weights, and a merge or an export would not see the masks: leave it out, and prune "
    "the exported network",
    BaseFinetuning: "it freezes and trains parameters that the method has chosen: leave it out, and set layers.freeze "
    "(POET) or layers.train (OFT)",
}
"""Callbacks of Lightning that give wrong weights with rotated or low-rank layers -> the reason, and the way out."""


def check_callbacks(trainer: L.Trainer | None, wraps: bool) -> None:
    """Refuse callbacks that would give wrong weights in silence.

    Args:
        trainer: The trainer, None where the module has none yet.
        wraps: Whether the module puts layers of its own into the network.

    Raises:
        ConfigurationError: Naming the callback, the reason and the way out.
    """
    for callback in given_callbacks(trainer):
        for kind, reason in REFUSED.items():
            # a module that wraps nothing is averaged and pruned as any other, if its network exists in time
            if isinstance(callback, kind) and (wraps or kind is StochasticWeightAveraging):
                raise ConfigurationError(f"trainer.callbacks has {type(callback).__name__}: {reason}")


def check_half_precision(module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Refuse parameters in fp16 whose optimizer divides by an ``eps`` that is zero in fp16.

    Raises:
        ConfigurationError: Naming a parameter, the optimizer and precisions that work.
    """
    names = {parameter: name for name, parameter in module.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            half = next((p for p in group["params"] if p.dtype == torch.float16 and p in names), None)
            if half is not None and 0 < group.get("eps", 1.0) < SMALLEST_HALF:
                raise ConfigurationError(
                    f"{names[half]} is trained in fp16, where the eps={group['eps']:g} of {type(optimizer).__name__} "
                    "is 0 and the first step gives NaN: take --trainer.precision bf16-true or 16-mixed"
                )


def check_rate_finder(trainer: L.Trainer, configured: dict[str, Any]) -> None:
    """Refuse a ``LearningRateFinder`` whose search is not the run, or whose result the run would not use.

    Lightning searches one rate for all parameter groups, without the callbacks of the module, and its result is
    overwritten by a schedule.

    Args:
        trainer: The trainer, with all its callbacks.
        configured: What ``configure_optimizers`` returns.

    Raises:
        ConfigurationError: Naming the reason and the way out.
    """
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    finder: Any = next((c for c in callbacks if isinstance(c, LearningRateFinder)), None)
    if finder is None:
        return
    rates = sorted({float(group["lr"]) for group in configured["optimizer"].param_groups})
    merging = merging_of(trainer)
    reason = None
    if merging is not None and merging.every_n_steps == 1:
        reason = "its search does not fold, and step-wise layers need that at every step: compare short runs instead"
    elif merging is not None and merging.every_n_steps <= finder._num_training_steps:
        reason = (
            f"its {finder._num_training_steps} steps are taken without the merges every {merging.every_n_steps} steps: "
            "lower num_training_steps, or compare short runs"
        )
    elif any(isinstance(callback, ProjectGenerators) for callback in callbacks):
        reason = "its steps are taken without the projection of coft_eps: set coft_eps after the search"
    elif len(rates) > 1:
        reason = f"it searches one rate for all parameters, and this run has {rates}: search with optimization.lr alone"
    elif "lr_scheduler" in configured:
        reason = "the schedule would overwrite its result: search without optimization.scheduler, then set lr"
    if reason is not None:
        raise ConfigurationError(f"trainer.callbacks has {type(finder).__name__}: {reason}")
