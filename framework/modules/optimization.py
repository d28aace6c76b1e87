"""Parameter groups, optimizer and schedule: one description for every module."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from orthotrain.errors import ConfigurationError
from orthotrain.layers import mergeable_layers


@dataclass(frozen=True)
class Optimization:
    """Learning rates, weight decay, optimizer and schedule.

    Args:
        lr: Learning rate of everything that is not a generator (embeddings, norms, biases, head).
        rotation_lr: Learning rate of the generators; None for ``lr``.
        lr_overrides: Glob pattern on parameter names -> learning rate instead of ``lr``, the first that matches wins;
            generators keep ``rotation_lr``.
        weight_decay: Weight decay of the matrices that are not generators. Generators, biases and norms have none: to
            decay a generator is to pull its rotation back to the last merge.
        optimizer: Builds the optimizer from parameter groups; None for ``torch.optim.AdamW``.
        scheduler: Builds the schedule from the optimizer, stepped every optimizer step; None for a constant rate. A
            schedule with a ``total_steps`` of None gets the trainer's number of optimizer steps.
    """

    lr: float = 1e-3
    rotation_lr: float | None = None
    lr_overrides: dict[str, float] | None = None
    weight_decay: float = 0.01
    optimizer: Callable[[Iterable], Optimizer] | None = None
    scheduler: Callable[[Optimizer], LRScheduler] | None = None

    def __post_init__(self) -> None:
        for name in ("lr", "rotation_lr", "weight_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ConfigurationError(f"optimization.{name}={value}: take a finite number of 0 or more")

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Split the trainable parameters by role and learning rate; the generators come first.

        Raises:
            ConfigurationError: If nothing in the model is trainable, or an override matches no trainable parameter.
        """
        rotations = {id(p) for _, layer in mergeable_layers(model) for p in layer.rotation_parameters()}
        used: set[str] = set()
        groups: dict[tuple[str, float], dict[str, Any]] = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            lr, decay, role = self._settings(name, parameter, id(parameter) in rotations, used)
            group = groups.setdefault((role, lr), {"name": role, "params": [], "lr": lr, "weight_decay": decay})
            group["params"].append(parameter)
        if not groups:
            raise ConfigurationError("the model has no trainable parameter: nothing to optimize")
        unused = set(self.lr_overrides or {}) - used
        if unused:
            names = ", ".join(name for name, p in model.named_parameters() if p.requires_grad)
            raise ConfigurationError(
                f"optimization.lr_overrides pattern {sorted(unused)[0]!r} matches no trainable parameter; "
                f"there are {names[:200]}"
            )
        return sorted(groups.values(), key=lambda group: group["name"] != "rotations")

    def _settings(self, name: str, parameter: nn.Parameter, rotation: bool, used: set[str]) -> tuple[float, float, str]:
        if rotation:
            return (self.lr if self.rotation_lr is None else self.rotation_lr), 0.0, "rotations"
        lr = self.lr
        for pattern, value in (self.lr_overrides or {}).items():
            if fnmatchcase(name, pattern):
                used.add(pattern)
                lr = value
                break
        return (lr, self.weight_decay, "decay") if parameter.ndim >= 2 else (lr, 0.0, "no_decay")

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
