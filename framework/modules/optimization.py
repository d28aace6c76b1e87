"""Learning rates, optimizers, schedule and clipping: the settings that every module has."""

import functools
import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from orthotrain.errors import ConfigurationError
from orthotrain.layers import mergeable_layers
from orthotrain.optimizers import CompositeOptimizer

T = TypeVar("T")
OptimizerFactory = Callable[[Iterable], Optimizer]
ROTATIONS = "rotations"
"""Beginning of the names of parameter groups that hold generators."""

RATES = {"lr", "weight_decay"}
"""Arguments of an optimizer that every parameter group sets."""
OVERRIDES = ("lr_overrides", "weight_decay_overrides", "optimizer_overrides")


@dataclass(frozen=True)
class ClipRamp:
    """Clip gradients harder after a merge, when the optimizer has no state of the generators.

    The bound rises linearly from ``start`` times the trainer's ``gradient_clip_val`` to the whole value (the official
    POET code ramps from 0.1 in 10 steps during early training). Layers that are folded early keep the optimizer's
    state, and no ramp follows.

    Args:
        steps: Optimizer steps of the ramp.
        start: Factor of the bound in the first step after a merge.
        until_step: Optimizer step after which no merge is followed by a ramp; None for the whole run.
    """

    steps: int = 10
    start: float = 0.1
    until_step: int | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.start <= 1:
            raise ConfigurationError(
                f"clip_ramp steps={self.steps}, start={self.start}: take 1 or more steps, and a start in (0, 1]"
            )

    def factor(self, step: int, last_merge: int | None) -> float:
        """Return the factor of the bound at optimizer step ``step``, when the last merge was at ``last_merge``."""
        if last_merge is None or (self.until_step is not None and step > self.until_step):
            return 1.0
        return min(1.0, self.start + (1 - self.start) * (step - last_merge) / self.steps)


def _refuse_rates(name: str, factory: OptimizerFactory | None) -> None:
    """Refuse a rate among the arguments of an optimizer: the parameter groups have rates of their own, which win."""
    if not isinstance(factory, functools.partial):
        return
    cls = factory.args[0] if factory.args else factory.func  # jsonargparse passes the class as an argument
    parameters = inspect.signature(cls).parameters
    for key in RATES & parameters.keys() & factory.keywords.keys():
        default, value = parameters[key].default, factory.keywords[key]
        if default is not inspect.Parameter.empty and value != default:  # a printed config has all defaults
            raise ConfigurationError(
                f"optimization.{name}: {cls.__name__} would ignore {key}={value}, because each parameter group has its "
                f"own: set optimization.{key}, rotation_{key} or {key}_overrides"
            )


@dataclass(frozen=True)
class Optimization:
    """Learning rates, weight decay, optimizers, schedule and clipping.

    Overrides are glob patterns on parameter names; the first pattern that matches a parameter wins. They do not apply
    to the generators, which have settings of their own.

    Args:
        lr: Learning rate of everything that is not a generator (embeddings, norms, biases, head).
        rotation_lr: Learning rate of the generators; None for ``lr``.
        rotation_lr_scale: Factor of the generators' learning rate (0.5 in the official POET code).
        lr_overrides: Pattern -> learning rate instead of ``lr``.
        weight_decay: Weight decay of the matrices that are not generators. Biases and norms have none.
        rotation_weight_decay: Weight decay of the generators: it pulls a rotation back to the last merge.
        weight_decay_overrides: Pattern -> weight decay instead, for matrices, biases and norms alike.
        optimizer: Builds the optimizer from parameter groups; None for ``torch.optim.AdamW``.
        rotation_optimizer: Builds the optimizer of the generators; None for ``optimizer``.
        optimizer_overrides: Pattern -> optimizer instead of ``optimizer``, for example ``{"*layers*proj*": {class_path:
            torch.optim.Muon}}``. All optimizers step as one (:class:`CompositeOptimizer`).
        scheduler: Builds the schedule from the optimizer, stepped every optimizer step; None for a constant rate. A
            schedule with a ``total_steps`` of None gets the trainer's number of optimizer steps.
        clip_ramp: Harder clipping after merges, None for none; it scales the trainer's ``gradient_clip_val``.
    """

    lr: float = 1e-3
    rotation_lr: float | None = None
    rotation_lr_scale: float = 1.0
    lr_overrides: dict[str, float] | None = None
    weight_decay: float = 0.01
    rotation_weight_decay: float = 0.0
    weight_decay_overrides: dict[str, float] | None = None
    optimizer: OptimizerFactory | None = None
    rotation_optimizer: OptimizerFactory | None = None
    optimizer_overrides: dict[str, OptimizerFactory] | None = None
    scheduler: Callable[[Optimizer], LRScheduler] | None = None
    clip_ramp: ClipRamp | None = None

    def __post_init__(self) -> None:
        values = {n: getattr(self, n) for n in ("lr", "rotation_lr", "rotation_lr_scale", "weight_decay")}
        values["rotation_weight_decay"] = self.rotation_weight_decay
        for name in ("lr_overrides", "weight_decay_overrides"):
            values |= {f"{name}[{pattern!r}]": value for pattern, value in (getattr(self, name) or {}).items()}
        for name, value in values.items():
            if value is not None and not 0 <= value < math.inf:
                raise ConfigurationError(f"optimization.{name}={value}: take a finite number of 0 or more")
        factories = {"optimizer": self.optimizer, "rotation_optimizer": self.rotation_optimizer}
        overrides = {f"optimizer_overrides[{key!r}]": each for key, each in (self.optimizer_overrides or {}).items()}
        for name, factory in (factories | overrides).items():
            _refuse_rates(name, factory)

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Split the trainable parameters by role, optimizer, learning rate and weight decay; the generators come first.

        Returns:
            Groups with ``name``, ``params``, ``lr``, ``weight_decay`` and ``build``, the optimizer's factory. Groups of
            generators have a ``side`` too: ``in`` or ``out``, or ``only`` where a layer is rotated on one side. No two
            groups have the same name: ``decay``, ``decay_2``.

        Raises:
            ConfigurationError: If nothing in the model is trainable, or an override matches no trainable parameter.
        """
        rotations: dict[int, int] = {}
        for _, layer in mergeable_layers(model):
            own = layer.rotation_parameters()
            rotations |= {id(p): len(own) for p in own}
        used: set[tuple[str, str]] = set()
        groups: dict[Any, dict[str, Any]] = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            settings = self._settings(name, parameter, rotations.get(id(parameter)), used)
            group = groups.setdefault(tuple(settings.values()), {**settings, "params": []})
            group["params"].append(parameter)
        if not groups:
            raise ConfigurationError("the model has no trainable parameter: nothing to optimize")
        self._refuse_unused(model, used)
        ordered = sorted(groups.values(), key=lambda group: not group["name"].startswith(ROTATIONS))
        counts: Counter[str] = Counter()
        for group in ordered:
            counts[group["name"]] += 1
            if (count := counts[group["name"]]) > 1:
                group["name"] += f"_{count}"
        return ordered

    def configure(self, model: nn.Module, total_steps: int | None) -> dict[str, Any]:
        """Return what ``LightningModule.configure_optimizers`` returns.

        Args:
            model: The wrapped model.
            total_steps: Optimizer steps of the run, None for a run without an end.

        Raises:
            ConfigurationError: If a schedule asks for the length of a run without an end.
        """
        optimizer = self.build(self.groups(model))
        if self.scheduler is None:
            return {"optimizer": optimizer}
        scheduler = self.scheduler(optimizer)
        if getattr(scheduler, "total_steps", 0) is None:
            if total_steps is None:
                raise ConfigurationError(
                    f"{type(scheduler).__name__} needs the length of the run, which trainer.max_steps=-1 leaves open: "
                    "set trainer.max_steps (or max_epochs, for data of a known length), or the schedule's total_steps"
                )
            scheduler.total_steps = total_steps  # type: ignore[attr-defined]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def build(self, groups: list[dict[str, Any]]) -> Optimizer:
        """Build the optimizer of ``groups``: one optimizer, or a composite of one for each factory."""
        by_factory: dict[OptimizerFactory, list[dict[str, Any]]] = {}
        for group in groups:
            plain = {key: value for key, value in group.items() if key != "build"}
            by_factory.setdefault(group["build"], []).append(plain)
        parts = [factory(own) for factory, own in by_factory.items()]
        return parts[0] if len(parts) == 1 else CompositeOptimizer(parts)

    def _settings(self, name: str, parameter: nn.Parameter, rotations: int | None, used: set[tuple[str, str]]) -> dict:
        build = self.optimizer or torch.optim.AdamW
        if rotations:
            lr = (self.lr if self.rotation_lr is None else self.rotation_lr) * self.rotation_lr_scale
            decay = self.rotation_weight_decay
            side = "out" if ".rotation_out." in f".{name}" else "in"
            name, side = (f"{ROTATIONS}_{side}", side) if rotations > 1 else (ROTATIONS, "only")
            build = self.rotation_optimizer or build
            return {"name": name, "lr": lr, "weight_decay": decay, "build": build, "side": side}
        matrix = parameter.ndim >= 2
        lr = self._override("lr_overrides", name, self.lr, used)
        decay = self._override("weight_decay_overrides", name, self.weight_decay if matrix else 0.0, used)
        build = self._override("optimizer_overrides", name, build, used)
        return {"name": "decay" if matrix else "no_decay", "lr": lr, "weight_decay": decay, "build": build}

    def _override(self, kind: str, name: str, default: T, used: set[tuple[str, str]]) -> T:
        for pattern, value in (getattr(self, kind) or {}).items():
            if fnmatchcase(name, pattern):
                used.add((kind, pattern))
                return value
        return default

    def _refuse_unused(self, model: nn.Module, used: set[tuple[str, str]]) -> None:
        for kind in OVERRIDES:
            for pattern in getattr(self, kind) or {}:
                if (kind, pattern) not in used:
                    names = ", ".join(name for name, p in model.named_parameters() if p.requires_grad)
                    raise ConfigurationError(
                        f"optimization.{kind} pattern {pattern!r} matches no trainable parameter; "
                        f"there are {names[:200]}"
                    )
