"""Checks of single values from a checkpoint (counts, numbers, curves, tensors), and how a message describes them."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from orthotrain.errors import ConfigurationError
from orthotrain.files.pickle_classes import is_count


def stored_count(state: dict[str, Any], name: str, optional: bool = False, signed: bool = False) -> Any:
    """Return a count from the stored state of a callback.

    Args:
        state: The state of the callback in a checkpoint.
        name: Key of the count.
        optional: Whether the count may be None or missing.
        signed: Whether the count may be negative, and as large as a seed (64 bits).

    Raises:
        ConfigurationError: The value is not a count.
    """
    value = state.get(name)
    if value is None and optional:
        return None
    if not (type(value) is int and -(1 << 63) <= value < 1 << 64 if signed else is_count(value)):
        raise _refused(name, "a count")
    return value


def stored_curves(state: dict[str, Any], name: str) -> dict[str, list[tuple[int, float]]]:
    """Return curves from the stored state of a callback: name -> pairs of step and value.

    Raises:
        ConfigurationError: The value is not a dictionary of such curves.
    """
    curves = _dictionary(state, name, _is_curve, "curves")
    return {key: [(step, value) for step, value in points] for key, points in curves.items()}


def stored_tensors(state: dict[str, Any], name: str) -> dict[str, Tensor]:
    """Return a dictionary of floating-point tensors from the stored state of a callback.

    Raises:
        ConfigurationError: The value is not such a dictionary.
    """
    return _dictionary(
        state, name, lambda value: isinstance(value, Tensor) and value.is_floating_point(), "floating-point tensors"
    )


def stored_numbers(state: dict[str, Any], name: str) -> dict[str, float]:
    """Return a dictionary of numbers from the stored state of a callback.

    Raises:
        ConfigurationError: The value is not such a dictionary.
    """
    return _dictionary(state, name, _is_plain_number, "numbers")


def is_named(value: Any) -> bool:
    """Tell whether a value is a dictionary whose keys are strings."""
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def is_number(value: Any) -> bool:
    """Tell whether a value is a number: an integer below 2^62, a float, or a real tensor of one element."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex() and not is_8bit_float(value)
    return _is_plain_number(value)


def is_8bit_float(value: Tensor) -> bool:
    """Tell whether a tensor has floating-point numbers of at most 8 bits, for which PyTorch has no arithmetic."""
    return value.is_floating_point() and value.dtype.itemsize < 2


def kind_of(value: Any) -> str:
    """Return the type of a value for a message; for a tensor, its shape and dtype."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    return "missing" if value is None else f"a {type(value).__name__}"


def short(value: Any) -> str:
    """Return a short form of a value for a message: of plain values at most 60 characters, of others the type."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 1 << 128:
        return "an integer of many digits"
    return repr(value)[:60] if isinstance(value, str | int | float | None) else kind_of(value)


def _is_plain_number(value: Any) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) < 1 << 62)


def _is_curve(value: Any) -> bool:
    pairs = isinstance(value, list) and all(isinstance(point, list | tuple) and len(point) == 2 for point in value)
    return pairs and all(_is_plain_number(number) for point in value for number in point)


def _dictionary(state: dict[str, Any], name: str, fits: Callable[[Any], bool], values: str) -> dict[str, Any]:
    found = state.get(name)
    if not is_named(found) or not all(map(fits, found.values())):  # type: ignore[union-attr]
        raise _refused(name, f"a dictionary of {values} by name")
    return found  # type: ignore[return-value]


def _refused(name: str, expected: str) -> ConfigurationError:
    return ConfigurationError(
        f"the checkpoint has the state of a callback with {name}, which is not {expected}: take an earlier one, or "
        "remove the callback"
    )
