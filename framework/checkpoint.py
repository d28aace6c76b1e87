"""Reading checkpoints: plain values and tensors only, never code."""

import pickle
from pathlib import Path
from typing import Any

import torch

from orthotrain.errors import ConfigurationError


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a Lightning checkpoint without executing anything from it.

    Raises:
        ConfigurationError: If the file is missing, truncated, or holds more than plain values and tensors.
    """
    if not Path(path).is_file():
        raise ConfigurationError(f"checkpoint {str(path)!r} is not a file; give the path of a .ckpt file of a run")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError) as error:
        reason = (str(error).strip() or "it is empty").splitlines()[0]
        raise ConfigurationError(f"checkpoint {str(path)!r} cannot be read: {reason}; take an earlier one") from error


def compare_state(saved: dict[str, Any], expected: dict[str, Any]) -> str | None:
    """Describe in one line how two state dicts differ in names and shapes; None if they agree."""
    missing = [name for name in expected if name not in saved]
    unknown = [name for name in saved if name not in expected]
    shapes = [
        f"{name} is {tuple(saved[name].shape)} there and {tuple(expected[name].shape)} here"
        for name in expected
        if name in saved and hasattr(saved[name], "shape") and saved[name].shape != expected[name].shape
    ]
    if not (missing or unknown or shapes):
        return None
    parts = [f"{len(shapes)} shapes differ ({shapes[0]})"] if shapes else []
    parts += [f"{len(missing)} tensors are not in it ({missing[0]})"] if missing else []
    parts += [f"{len(unknown)} of its tensors are not in the model ({unknown[0]})"] if unknown else []
    return "; ".join(parts)
