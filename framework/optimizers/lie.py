"""An optimizer for generators: momentum on the Lie algebra, a bounded angle a step."""

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from orthotrain.errors import ConfigurationError, check_choice
from orthotrain.kernels.skew import block_size_of
from orthotrain.kernels.skew.reference import skew_backward, skew_forward

Direction = Literal["orthogonal", "adam", "sign"]

WARN_ANGLE, LARGEST_ANGLE = 0.024, 0.1
# Quintic of Muon (Jordan et al., 2024): it takes singular values of (0, 1] to about [0.7, 1.2] in five steps.
QUINTIC = (3.4445, -4.7750, 2.0315)


class LieOptimizer(Optimizer):
    """Steps of a bounded angle along momentum that lives on the skew-symmetric matrices.

    For layers that fold every step: the generators are zero when a step begins, their gradient is that at the identity,
    and the step sets them to ``-angle * X``, which the fold makes a rotation by about ``2 * angle`` (D = 2Q). Between
    resamplings of the permutations the algebra at the identity is one and the same space, so the first moment keeps its
    meaning from step to step. The direction X of each block is

    - ``orthogonal``: the moment with all singular values brought to about 1 by a Newton-Schulz iteration. An odd
      polynomial of a skew matrix is skew, so X stays in the algebra (Muon's direction, on the algebra);
    - ``adam``: first over square root of second moment, both corrected for their start, and
    - ``sign``: the sign of the first moment, these two divided by ``sqrt(b - 1)``, so that entries of size 1 have the
      Frobenius norm of an orthogonal block, ``sqrt(b)``.

    Args:
        params: Generators ``(n, b(b-1)/2)``, or groups of them. A group may name its ``side``, ``in`` or ``out``.
        lr: The angle of a step in radians: scheduled like any learning rate, above 0 and up to 0.1.
        direction: ``orthogonal``, ``adam`` or ``sign``.
        momentum: Decay of the first moment.
        beta2: Decay of the second moment (``adam``).
        nesterov: Whether the direction looks one step ahead.
        alternate: Whether output sides move on even steps and input sides on odd ones. Both moments advance every step.
        movement: If given, the angle is scaled block by block, so that a weight moves by ``lr * movement`` of its own
            size in root mean square: ``||X||_F`` is brought to ``sqrt(b) * movement / 2``.
        weight_decay: Must be 0: the generators are zero when a step begins.

    Raises:
        ConfigurationError: For an angle or option out of its range, or parameters that are not generators.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.015,
        direction: Direction = "orthogonal",
        momentum: float = 0.95,
        beta2: float = 0.99,
        nesterov: bool = True,
        alternate: bool = True,
        movement: float | None = None,
        weight_decay: float = 0.0,
    ) -> None:
        check_choice("direction", direction, Direction)
        for name, value in (("momentum", momentum), ("beta2", beta2)):
            if not 0 <= value < 1:
                raise ConfigurationError(f"LieOptimizer: {name}={value}: take at least 0 and below 1")
        if movement is not None and not movement > 0:
            raise ConfigurationError(f"LieOptimizer: movement={movement}: take a positive fraction, or null")
        self.direction: Direction = direction
        self.nesterov, self.alternate, self.movement = nesterov, alternate, movement
        defaults = {"lr": lr, "momentum": momentum, "beta2": beta2, "weight_decay": weight_decay, "steps": 0}
        super().__init__(params, defaults)
        for group in self.param_groups:
            check_angle(group["lr"])
            if group["weight_decay"]:
                raise ConfigurationError("LieOptimizer: weight_decay must be 0: generators are zero between steps")
            for parameter in group["params"]:
                check_generators(parameter, group.get("name"))

    # torch.compile takes the directions; the counting around them would be compiled anew for every count
    @torch.compiler.disable(recursive=False)
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Advance all moments and move the sides whose turn it is."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            turn = ("out", "in")[group["steps"] % 2]
            group["steps"] += 1
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            moments = self._advance(group, parameters)
            parameters = [local(p) for p in parameters]
            if self.alternate and group.get("side", turn) != turn:
                continue
            # one batch for all layers of a block size
            by_width: dict[int, list[int]] = {}
            for place, parameter in enumerate(parameters):
                by_width.setdefault(parameter.shape[1], []).append(place)
            for width, places in by_width.items():
                chosen = [parameters[place] for place in places]
                directions = self._directions(torch.cat([moments[place] for place in places]), width)
                parts = directions.split([p.shape[0] for p in chosen])
                torch._foreach_add_(chosen, [part.to(p.dtype) for part, p in zip(parts, chosen, strict=True)],
                                    alpha=-float(group["lr"]))  # fmt: skip
        return loss

    @torch.compiler.disable(recursive=False)
    def _advance(self, group: dict[str, Any], parameters: list[Tensor]) -> list[Tensor]:
        """Update the moments and return what the direction is made of, one tensor a parameter."""
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {"step": 0, "momentum": torch.zeros_like(parameter, dtype=torch.float32)}
                if self.direction == "adam":
                    self.state[parameter]["square"] = torch.zeros_like(parameter, dtype=torch.float32)
            self.state[parameter]["step"] += 1
        gradients = [local(p.grad).float() for p in parameters]  # type: ignore[arg-type]
        moments = [local(self.state[p]["momentum"]) for p in parameters]
        beta, steps = group["momentum"], [self.state[p]["step"] for p in parameters]
        torch._foreach_lerp_(moments, gradients, 1 - beta)
        ahead = torch._foreach_lerp(moments, gradients, 1 - beta) if self.nesterov else moments
        if self.direction != "adam":
            return list(ahead)
        squares = [local(self.state[p]["square"]) for p in parameters]
        torch._foreach_mul_(squares, group["beta2"])
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - group["beta2"])
        # Nesterov's moment has weight beta on the past of `step` gradients and the rest on the last one
        first = [1 - beta ** (step + int(self.nesterov)) for step in steps]
        second = [1 - group["beta2"] ** step for step in steps]
        return [m / c / ((s / d).sqrt() + 1e-12) for m, c, s, d in zip(ahead, first, squares, second, strict=True)]

    def _directions(self, moments: Tensor, width: int) -> Tensor:
        """Return the directions of blocks, ``(n, b(b-1)/2)``, from their moments."""
        size = checked_block_size(width)
        if self.direction == "orthogonal":
            result = orthogonalize(moments, size)
        else:
            result = (moments.sign() if self.direction == "sign" else moments) / math.sqrt(max(1, size - 1))
        if self.movement is not None:
            # every generator stands in Q twice
            norms = math.sqrt(2) * result.norm(dim=1, keepdim=True)
            result = result * (math.sqrt(size) * self.movement / 2 / norms.clamp_min(1e-30))
        return result


def local(tensor: Tensor) -> Tensor:
    """Return this rank's rows of a sharded tensor, which share its memory: blocks are whole rows and move alone."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def orthogonalize(generators: Tensor, block_size: int, steps: int = 5) -> Tensor:
    """Bring the singular values of skew blocks to about 1, those that are not negligible beside the largest.

    Args:
        generators: ``(n, b(b-1)/2)``, fp32.
        block_size: Size b.
        steps: Iterations of the quintic ``X <- a X + b (X X^T) X + c (X X^T)^2 X``; for skew X it is
            ``X (a - b X^2 + c X^4)``.

    Returns:
        Generators of the same shape. Zero blocks stay zero.
    """
    x = skew_forward(generators, block_size)
    # the Frobenius norm bounds the largest singular value; those of a skew matrix come in pairs, hence the root of 2
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] / math.sqrt(2)).clamp_min(1e-30)
    a, b, c = QUINTIC
    for _ in range(steps):
        square = x @ x
        x = torch.baddbmm(x, x, torch.baddbmm(square, square, square, beta=-b, alpha=c), beta=a)
    return skew_backward(x) / 2


def checked_block_size(width: int) -> int:
    """Return b with ``b(b-1)/2 = width``.

    Raises:
        ConfigurationError: If there is none.
    """
    size = block_size_of(width)
    if size is None:
        raise ConfigurationError(f"LieOptimizer: a width of {width} is that of no skew block: b(b-1)/2 for a size b")
    return size


def check_angle(angle: float) -> None:
    """Refuse an angle that is not positive or beyond 0.1; warn from 0.024.

    Raises:
        ConfigurationError: Naming it.
    """
    if not 0 < angle <= LARGEST_ANGLE:
        raise ConfigurationError(
            f"LieOptimizer: an angle of {angle} rad a step: take one above 0 and up to {LARGEST_ANGLE}; 0.015 is usual"
        )
    if angle >= WARN_ANGLE:
        warnings.warn(f"LieOptimizer: {angle} rad a step is a large angle; 0.015 is usual", stacklevel=3)


def check_generators(parameter: Tensor, role: str | None) -> None:
    """Refuse a parameter that cannot be the generators of a block rotation.

    Raises:
        ConfigurationError: Naming its shape.
    """
    if role not in (None, "rotations") or parameter.ndim != 2:
        raise ConfigurationError(
            f"LieOptimizer takes generators alone, not a parameter of shape {tuple(parameter.shape)}: give it as "
            "rotation_optimizer"
        )
    checked_block_size(parameter.shape[1])
