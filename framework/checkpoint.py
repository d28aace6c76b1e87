"""Reading checkpoints: plain values and tensors only, never code."""

import zipfile
from pathlib import Path
from typing import Any

import torch

from orthotrain.checkpoint_io import needs_consolidating
from orthotrain.errors import ConfigurationError
from orthotrain.model_folder import MADE_BY
from orthotrain.sharded_checkpoint import REST, check_shards


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a Lightning checkpoint without executing anything from it.

    Raises:
        ConfigurationError: If the file is missing, a folder, truncated, or holds more than plain values and tensors.
    """
    if Path(path).is_dir():
        refuse_run_folder(Path(path))
        raise needs_consolidating(path)
    if not Path(path).is_file():
        hint = MADE_BY.get(str(path), "give the path of a .ckpt file of a run")
        raise ConfigurationError(f"checkpoint {str(path)!r} is not a file; {hint}")
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("it is no checkpoint or is truncated")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to ask for
        raise _unreadable(path, error) from error
    if not isinstance(checkpoint, dict):
        raise _unreadable(path, ValueError(f"it holds a {type(checkpoint).__name__} and not a dictionary"))
    return checkpoint


def refuse_run_folder(path: Path) -> None:
    """Refuse the folder of a run in the place of a checkpoint in it; that of a distributed checkpoint passes.

    Raises:
        ConfigurationError: Naming the newest checkpoint in it.
    """
    within = [] if (path / REST).exists() else sorted(path.rglob("*.ckpt"), key=lambda file: file.stat().st_mtime_ns)
    if within:
        raise ConfigurationError(f"checkpoint {str(path)!r} is a folder; the newest in it is {str(within[-1])!r}")


def check_checkpoint(path: str | Path) -> None:
    """Make sure that a checkpoint, a file or the folder of a distributed one, is whole and holds no code.

    Every byte of a file is compared with its checksum (about a second per GB).

    Raises:
        ConfigurationError: Naming what is wrong with it.
    """
    path = Path(path)
    if path.is_dir():
        check_shards(path)
        read_checkpoint(path / REST)
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:
        raise _unreadable(path, error) from error
    if damaged is not None:
        raise _unreadable(path, ValueError(f"{damaged} does not match its checksum"))
    read_checkpoint(path)


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


def _unreadable(path: str | Path, error: Exception) -> ConfigurationError:
    reason = (str(error).strip() or "it is empty").splitlines()[0]
    # what follows in torch's message advises to load it in spite of that
    reason = reason.partition(". In PyTorch")[0].partition("Re-running `torch.load`")[0]
    return ConfigurationError(f"checkpoint {str(path)!r} cannot be read: {reason}; take an earlier one")
