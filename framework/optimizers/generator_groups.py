"""Checks of the parameter groups of LieOptimizer, and the angle of their steps."""

import math
from typing import Any

from torch import Tensor

from orthotrain.errors import ConfigurationError
from orthotrain.kernels.skew import block_size_of
from orthotrain.layers.rotation.generator_marks import rotated_share

SIDES = ("in", "out")
"""Sides that take turns; generators of a layer that is rotated on one side have the side ``only``."""

TURN = 2.0
"""Angle of a rotation for a generator of 1 rad: every parameterization is I + 2Q to first order (plugins/base.py)."""

USUAL_ANGLE, WARN_ANGLE, LARGEST_ANGLE = 0.025, 0.04, 0.2
"""Radians of a step: the default, where a warning begins, and what is refused."""


def angle_of_unit_rate(group: dict[str, Any], parameter: Tensor) -> float:
    """Return the angle of a step at ``lr = 1``: 1, or with ``movement`` the angle that moves the weight by this share.

    A rotation of one side changes the weight by ``D^T W``, where the singular values of D are the angles to first
    order. For blocks of features drawn at random, ``E ||D^T W||^2 = ||W||^2 sum_k ||D_k||^2 / d``. With
    ``||D_k||^2 = b angle^2`` in each of n blocks, this is ``angle^2 s ||W||^2``, where ``s = n b / d`` is the share of
    the features that lie in a block. The changes of two sides in one step are taken as orthogonal, so that their
    squares add. The RMS of the change over the RMS of the weight is then ``angle sqrt(s * sides)``. It is
    ``lr * movement`` for the angle ``lr * movement / sqrt(s * sides)``.

    The expectation is over blocks that do not depend on W, but gradients do. Where a block is as wide as the weight,
    there is no permutation, and both sides change W in the same direction; then the change is larger, by up to
    ``sqrt(2)``. ``MovementMonitor`` logs the real change.

    Args:
        group: The parameter group.
        parameter: Generators of one side of a layer.
    """
    if group["movement"] is None:
        return 1.0
    share = rotated_share(parameter)
    assert share is not None
    sides = 2 if group.get("side") in SIDES and not group["alternate"] else 1
    return group["movement"] / math.sqrt(share * sides)


def check_angle(group: dict[str, Any], *, resting: bool = False) -> float:
    """Return the largest angle of a group's step.

    Args:
        group: The parameter group.
        resting: Whether an angle of 0 is allowed, as at the beginning or end of a schedule.

    Raises:
        ConfigurationError: If the angle is not positive and below 0.2.
    """
    lr = float(group["lr"])
    angle = lr * max((angle_of_unit_rate(group, parameter) for parameter in group["params"]), default=1.0)
    if not (0 < angle < LARGEST_ANGLE or (resting and angle == 0)):
        of = "" if group["movement"] is None else f" (lr={lr:g} with movement={group['movement']:g})"
        raise ConfigurationError(
            f"LieOptimizer: an angle of {angle:g} rad a step{of}: take one above 0 and below {LARGEST_ANGLE}; "
            f"{USUAL_ANGLE} is usual"
        )
    return angle


def check_group(group: dict[str, Any]) -> None:
    """Refuse a group with an option out of its range, or with a parameter that is not the generators of a rotation.

    Raises:
        ConfigurationError: Naming the option, or the shape of the parameter.
    """
    for name in ("momentum", "beta2"):
        if not 0 <= group[name] < 1:
            raise ConfigurationError(f"LieOptimizer: {name}={group[name]}: take at least 0 and below 1")
    if group["movement"] is not None and not group["movement"] > 0:
        raise ConfigurationError(f"LieOptimizer: movement={group['movement']}: take a positive fraction, or null")
    if group["weight_decay"]:
        raise ConfigurationError("LieOptimizer: weight_decay must be 0: generators are zero between steps")
    if group.get("side", "only") not in (*SIDES, "only"):
        raise ConfigurationError(f"LieOptimizer: side={group['side']!r}: choose one of in, out, only")
    for parameter in group["params"]:
        if not str(group.get("name") or "rotations").startswith("rotations") or rotated_share(parameter) is None:
            raise ConfigurationError(
                f"LieOptimizer takes only generators, not a parameter of shape {tuple(parameter.shape)}: use it as "
                "rotation_optimizer, or with the rotation_parameters() of layers"
            )
        checked_block_size(parameter.shape[1])


def checked_block_size(width: int) -> int:
    """Return b with ``b(b-1)/2 = width``.

    Raises:
        ConfigurationError: If there is no such b.
    """
    size = block_size_of(width)
    if size is None:
        raise ConfigurationError(f"LieOptimizer: no block has {width} generators: b(b-1)/2 for a size b")
    return size
