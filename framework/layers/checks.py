"""Checks of the settings of a layer; the errors name values that would work."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from orthotrain.errors import ConfigurationError
from orthotrain.kernels.checks import check_permutation, debug_permutation
from orthotrain.kernels.dispatch import check_possible, traced
from orthotrain.plugins import Parameterization, create


def check_divides(name: str, size: int, width: int, what: str, minimum: int = 1) -> None:
    """Refuse a size that does not divide a width; it is never changed silently.

    Args:
        name: Name of the argument.
        size: Its value, in features.
        width: Width to divide, in features.
        what: Description of the width for the message.
        minimum: Smallest size that makes sense.

    Raises:
        ConfigurationError: Naming both sizes and the divisors of the width next to ``size``.
    """
    if isinstance(size, int) and not isinstance(size, bool) and size >= minimum and width % size == 0:
        return
    divisors = [d for d in range(minimum, width + 1) if width % d == 0]
    if not divisors:
        raise ConfigurationError(
            f"{name}={size!r} does not divide {what}: no {name} from {minimum} up does; add the layer to exclude"
        )
    below = [d for d in divisors if isinstance(size, int) and d < size][-1:]
    above = [d for d in divisors if not isinstance(size, int) or d > size][:1]
    near = " and ".join(map(str, below + above))
    raise ConfigurationError(f"{name}={size!r} does not divide {what}; near it: {near}")


def check_kernels(device: torch.device | None = None) -> None:
    """Refuse the explicit choice ``triton`` where this machine or this device cannot run it.

    Raises:
        ConfigurationError: Naming the reason and a choice that would run.
    """
    with _refusing():
        check_possible(device)


def check_block_size(features: int, block_size: int) -> None:
    """Refuse a block size that does not fit ``features`` features.

    Raises:
        ConfigurationError: Naming the size and sizes that would work.
    """
    if isinstance(block_size, bool) or not isinstance(block_size, int) or not 2 <= block_size <= features:
        raise ConfigurationError(f"block_size={block_size!r} does not fit {features} features: {_fitting(features)}")


def _fitting(features: int) -> str:
    """Return what would work where a block does not fit a width."""
    if features < 2:
        return "a rotation needs 2 or more; add the layer to exclude"
    return f"take an integer from 2 to {features}, or add the layer to exclude"


def check_feature_permutation(permutation: Tensor | None, features: int) -> None:
    """Refuse a tensor that is no permutation of ``features`` features; values are checked with ``ORTHOTRAIN_DEBUG=1``.

    Raises:
        ConfigurationError: Naming the fault.
    """
    if permutation is None:
        return
    with _refusing():
        check_permutation("BlockRotation", "permutation", permutation, features, permutation)
        if not traced(permutation):
            debug_permutation("BlockRotation", "permutation", permutation)


def check_parameterization(spec: Parameterization | str) -> None:
    """Refuse a parameterization that does not exist.

    Raises:
        ConfigurationError: Naming it and the known ones.
    """
    with _refusing("parameterization: "):
        create(spec)


@contextmanager
def _refusing(prefix: str = "") -> Iterator[None]:
    """Raise the ValueError of a lower room as a :class:`ConfigurationError`."""
    try:
        yield
    except ValueError as error:
        raise ConfigurationError(f"{prefix}{error}") from error
