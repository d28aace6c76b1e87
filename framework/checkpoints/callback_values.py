"""What callbacks remember in a checkpoint: counts, curves and tensors, each looked at before it is taken."""

from typing import Any

from torch import Tensor

from orthotrain.errors import ConfigurationError


def stored_count(state: dict[str, Any], name: str, optional: bool = False, signed: bool = False) -> Any:
    """Return a count of a stored state.

    Args:
        state: What a checkpoint has of a callback.
        name: The entry.
        optional: Whether None will do.
        signed: Whether it may be negative, and as large as a seed.

    Raises:
        ConfigurationError: If it is none.
    """
    value = state.get(name)
    if value is None and optional:
        return None
    if type(value) is not int or not (-(1 << 63) <= value < 1 << 64 if signed else 0 <= value < 1 << 62):
        raise _refused(name, "no count")
    return value


def stored_curves(state: dict[str, Any], name: str) -> dict[str, list[tuple[int, float]]]:
    """Return curves of a stored state: name -> pairs of step and value.

    Raises:
        ConfigurationError: If they are none.
    """
    curves = _table(state, name)
    for points in curves.values():
        if not isinstance(points, list) or not all(
            isinstance(point, list | tuple) and len(point) == 2 and all(map(_is_number, point)) for point in points
        ):
            raise _refused(name, "no table of curves")
    return {key: [(step, value) for step, value in points] for key, points in curves.items()}


def stored_tensors(state: dict[str, Any], name: str) -> dict[str, Tensor]:
    """Return tensors of a stored state by their names.

    Raises:
        ConfigurationError: If they are none.
    """
    tensors = _table(state, name)
    if not all(isinstance(value, Tensor) and value.is_floating_point() for value in tensors.values()):
        raise _refused(name, "no table of tensors")
    return tensors


def stored_numbers(state: dict[str, Any], name: str) -> dict[str, float]:
    """Return numbers of a stored state by their names.

    Raises:
        ConfigurationError: If they are none.
    """
    numbers = _table(state, name)
    if not all(_is_number(value) for value in numbers.values()):
        raise _refused(name, "no table of numbers")
    return numbers


def _table(state: dict[str, Any], name: str) -> dict[str, Any]:
    table = state.get(name)
    if not isinstance(table, dict) or not all(isinstance(key, str) for key in table):
        raise _refused(name, "no table by names")
    return table


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, float) or abs(value) < 1 << 62


def _refused(name: str, what: str) -> ConfigurationError:
    return ConfigurationError(
        f"the checkpoint has {what} as {name}, which a callback remembers there; take an earlier one, or leave the "
        "callback out"
    )
