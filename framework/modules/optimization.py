"""Parameter groups, optimizer and schedule: one description for every module."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from orthotrain.errors import ConfigurationError
from orthotrain.layers import mergeable_layers


@dataclass
class Optimization:
    """Learning rates, weight decay, optimizer and schedule.

    Args:
        lr: Learning rate of everything that is not a generator (embeddings, norms, biases, head).
        rotation_lr: Learning rate of the generators; None for ``lr``.
        weight_decay: Weight decay of the matrices that are not generators. Generators, biases and norms have none: to
            decay a generator is to pull its rotation back to the last merge.
        optimizer: Builds the optimizer from parameter groups; None for ``torch.optim.AdamW``.
        scheduler: Builds the schedule from the optimizer, stepped every optimizer step; None for a constant rate. A
            schedule with a ``total_steps`` of None gets the trainer's number of optimizer steps.
    """

    lr: float = 1e-3
    rotation_lr: float | None = None
    weight_decay: float = 0.01
    optimizer: Callable[[Iterable], Optimizer] | None = None
    scheduler: Callable[[Optimizer], LRScheduler] | None = None

    def __post_init__(self) -> None:
        for name in ("lr", "rotation_lr", "weight_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ConfigurationError(f"optimization.{name}={value}: take a finite number of 0 or more")

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Split the trainable parameters into ``rotations``, ``decay`` and ``no_decay``; empty groups are left out.

        Raises:
            ConfigurationError: If nothing in the model is trainable.
        """
        rotations = [p for _, layer in mergeable_layers(model) for p in layer.rotation_parameters() if p.requires_grad]
        taken = {id(p) for p in rotations}
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
        rotation_lr = self.lr if self.rotation_lr is None else self.rotation_lr
        groups = [
            {"name": "rotations", "params": rotations, "lr": rotation_lr, "weight_decay": 0.0},
            {"name": "decay", "params": [p for p in others if p.ndim >= 2], "lr": self.lr,
             "weight_decay": self.weight_decay},
            {"name": "no_decay", "params": [p for p in others if p.ndim < 2], "lr": self.lr, "weight_decay": 0.0},
        ]  # fmt: skip
        groups = [group for group in groups if group["params"]]
        if not groups:
            raise ConfigurationError("the model has no trainable parameter: nothing to optimize")
        return groups

    def configure(self, model: nn.Module, total_steps: int) -> dict[str, Any]:
        """Return what ``LightningModule.configure_optimizers`` returns.

        Args:
            model: The wrapped model.
            total_steps: Optimizer steps of the run.
        """
        optimizer = (self.optimizer or torch.optim.AdamW)(self.groups(model))
        if self.scheduler is None:
            return {"optimizer": optimizer}
        scheduler = self.scheduler(optimizer)
        if getattr(scheduler, "total_steps", 0) is None:
            scheduler.total_steps = total_steps  # type: ignore[attr-defined]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
