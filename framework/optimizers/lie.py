"""LieOptimizer: an optimizer for generators, with momentum on the Lie algebra and steps of a bounded angle."""

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from orthotrain.errors import ConfigurationError, check_choice
from orthotrain.layers.rotation.generator_marks import mark_resting
from orthotrain.optimizers.generator_groups import (
    SIDES,
    TURN,
    USUAL_ANGLE,
    WARN_ANGLE,
    angle_of_unit_rate,
    check_angle,
    check_group,
    checked_block_size,
)
from orthotrain.optimizers.orthogonalize import orthogonalize

Direction = Literal["orthogonal", "adam", "sign"]

SETTINGS = ("direction", "nesterov", "alternate", "movement")
"""Settings of a group that a resumed run cannot change, because its moments would have another meaning."""


class LieOptimizer(Optimizer):
    """Optimizer of the generators of step-wise layers: steps of a bounded angle along a moment of skew matrices.

    The layers are folded at every step. So the generators are zero when a step begins, and their gradient is the
    gradient at the identity. The step sets them to ``-(lr / 2) * X``. Every parameterization is I + 2Q to first order,
    so the fold turns the planes of X by ``lr`` times its singular values; a direction of singular value 1 turns by
    ``lr`` radians. (Exact Cayley turns by ``2 atan(lr / 2)``, which is 0.03% less at 0.06 and 0.3% less at 0.2.) Until
    new permutations are drawn, all gradients are in the same space, the Lie algebra at the identity, so that the first
    moment keeps its meaning from step to step. The direction X of each block is

    - ``orthogonal``: the moment with its singular values brought to 1 by an iteration (:func:`orthogonalize`): those
      above 1e-3 of the largest end within 0.05 of 1, smaller ones between 0 and 1. So the mean and the largest turn are
      within 5% of ``lr``. An odd polynomial of a skew matrix is skew, so X stays in the algebra (Muon's direction, on
      the algebra);
    - ``adam``: the first moment over the square root of the second, both corrected for their start at zero, or
    - ``sign``: the sign of the first moment. Both are divided by ``sqrt(b - 1)``, so that entries of size 1 have the
      Frobenius norm of an orthogonal block, ``sqrt(b)``: the root mean square of the turns is ``lr``. The largest turn
      is larger.

    The state is one moment of the generators in fp32, or two with ``adam``. For a square weight of width d, rotated on
    both sides, one moment takes ``b / 2d`` of the memory of AdamW's two moments of the weight: a quarter at b = d/2.

    Args:
        params: Generators ``(n, b(b-1)/2)``, or groups of them. A group may have a ``side``: ``in`` or ``out`` where
            both sides of the layer are rotated, else ``only``, the default. A group may replace every argument below.
        lr: The angle of a step in radians, above 0 and below 0.2; a schedule may change it.
        direction: ``orthogonal``, ``adam`` or ``sign``.
        momentum: Decay of the first moment.
        beta2: Decay of the second moment (``adam``).
        nesterov: Whether the direction includes the present gradient once more (Nesterov).
        alternate: Whether output sides move on even steps and input sides on odd ones. The moments of both sides are
            updated at every step. A layer with one rotated side moves at every step.
        movement: If given, each layer gets the angle at which the root mean square of the change of its weight is
            ``lr * movement`` times that of the weight (:func:`angle_of_unit_rate`). The bound of the angle holds too.
        weight_decay: Must be 0: the generators are zero when a step begins.

    Raises:
        ConfigurationError: For an angle or option out of its range, or parameters that are not generators; in ``step``,
            for an angle that a schedule has moved out of its range.
    """

    _warned = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = USUAL_ANGLE,
        direction: Direction = "orthogonal",
        momentum: float = 0.95,
        beta2: float = 0.99,
        nesterov: bool = True,
        alternate: bool = True,
        movement: float | None = None,
        weight_decay: float = 0.0,
    ) -> None:
        options = {"direction": direction, "nesterov": nesterov, "alternate": alternate, "movement": movement}
        defaults = {"lr": lr, "momentum": momentum, "beta2": beta2, "weight_decay": weight_decay, "steps": 0}
        super().__init__(params, {**defaults, **options})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of generators; see the class for arguments and errors."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_choice("direction", group["direction"], Direction)
            check_group(group)
            self._warn(check_angle(group))
        except ConfigurationError:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore moments and counts.

        Raises:
            ConfigurationError: If the state was made with another setting, naming the setting.
        """
        for ours, theirs in zip(self.param_groups, state_dict["param_groups"], strict=False):
            for name in SETTINGS:
                if name not in theirs:
                    raise ConfigurationError(
                        f"LieOptimizer: the checkpoint's optimizer state has no {name}: it is the state of another "
                        "optimizer; use the config of the checkpoint"
                    )
                if theirs[name] != ours[name]:
                    raise ConfigurationError(
                        f"LieOptimizer: the checkpoint was trained with {name}={theirs[name]!r}, this run has "
                        f"{ours[name]!r}: use the config of the checkpoint"
                    )
        super().load_state_dict(state_dict)

    # torch.compile compiles only the directions; code with the count of steps would be recompiled at every step
    @torch.compiler.disable(recursive=False)
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update all moments, and move the sides whose turn it is."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._warn(check_angle(group, resting=True))
            turn = ("out", "in")[group["steps"] % 2]
            group["steps"] += 1
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            moments = self._advance(group, parameters)
            if group["alternate"] and group.get("side") in SIDES and group["side"] != turn:
                for parameter in parameters:
                    mark_resting(parameter)
            else:
                self._move(group, parameters, moments)
        return loss

    @torch.compiler.disable(recursive=False)
    def _move(self, group: dict[str, Any], parameters: list[Tensor], moments: list[Tensor]) -> None:
        """Take the step along the directions of the moments, in one batch for all blocks of a size."""
        by_width: dict[int, list[int]] = {}
        for index, parameter in enumerate(parameters):
            by_width.setdefault(parameter.shape[1], []).append(index)
        for width, indices in by_width.items():
            chosen = [local(parameters[index]) for index in indices]
            directions = self._directions(torch.cat([moments[index] for index in indices]), width, group["direction"])
            if group["movement"] is not None:
                directions = of_unit_angle(directions, width)
            parts = list(directions.split([p.shape[0] for p in chosen]))
            rate = -float(group["lr"]) / TURN
            torch._foreach_mul_(parts, [rate * angle_of_unit_rate(group, parameters[index]) for index in indices])
            torch._foreach_add_(chosen, [part.to(p.dtype) for part, p in zip(parts, chosen, strict=True)])

    @torch.compiler.disable(recursive=False)
    def _advance(self, group: dict[str, Any], parameters: list[Tensor]) -> list[Tensor]:
        """Update the moments; return the tensors from which the directions are computed, one for each parameter."""
        names = ("momentum", "square") if group["direction"] == "adam" else ("momentum",)
        for parameter in parameters:
            # a sharded checkpoint has placeholders of other optimizers for parameters whose state was dropped
            if not self.state[parameter].keys() >= {"step", *names}:
                zeros = {name: torch.zeros_like(parameter, dtype=torch.float32) for name in names}
                self.state[parameter] = {"step": 0, **zeros}
            self.state[parameter]["step"] += 1
        gradients = [local(p.grad).float() for p in parameters]  # type: ignore[arg-type]
        moments = [local(self.state[p]["momentum"]) for p in parameters]
        beta, steps = group["momentum"], [self.state[p]["step"] for p in parameters]
        torch._foreach_lerp_(moments, gradients, 1 - beta)
        ahead = torch._foreach_lerp(moments, gradients, 1 - beta) if group["nesterov"] else moments
        if group["direction"] != "adam":
            return list(ahead)
        squares = [local(self.state[p]["square"]) for p in parameters]
        torch._foreach_mul_(squares, group["beta2"])
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - group["beta2"])
        # Nesterov's moment is beta times the moment of `step` gradients, plus the rest times the last gradient
        first = torch._foreach_div(ahead, [1 - beta ** (step + int(group["nesterov"])) for step in steps])
        second = torch._foreach_div(squares, [1 - group["beta2"] ** step for step in steps])
        torch._foreach_sqrt_(second)
        torch._foreach_add_(second, 1e-12)
        return list(torch._foreach_div(first, second))

    def _warn(self, angle: float) -> None:
        if angle >= WARN_ANGLE and not self._warned:
            self._warned = True
            warnings.warn(f"LieOptimizer: {angle:g} rad a step is a large angle; {USUAL_ANGLE} is usual", stacklevel=2)

    def _directions(self, moments: Tensor, width: int, direction: Direction) -> Tensor:
        """Return the directions of blocks, ``(n, b(b-1)/2)``, from their moments."""
        size = checked_block_size(width)
        if direction == "orthogonal":
            return orthogonalize(moments, size)
        return (moments.sign() if direction == "sign" else moments) / math.sqrt(max(1, size - 1))


def of_unit_angle(directions: Tensor, width: int) -> Tensor:
    """Bring every block of directions ``(n, b(b-1)/2)`` to singular values of 1 in root mean square."""
    # every generator is an entry of Q twice
    norms = math.sqrt(2) * directions.norm(dim=1, keepdim=True)
    return directions * (math.sqrt(checked_block_size(width)) / norms.clamp_min(1e-30))


def local(tensor: Tensor) -> Tensor:
    """Return this rank's rows of a sharded tensor, in the same memory; a row is a block, and moves by itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
