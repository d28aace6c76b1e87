"""Reading checkpoints: plain values and tensors only, never code, and never more than the file holds."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orthotrain.checkpoints.shards import REST, check_shards
from orthotrain.checkpoints.writing import needs_consolidating
from orthotrain.errors import ConfigurationError, visible
from orthotrain.files.paths import local_path
from orthotrain.files.plain_files import check_file, describe_file, read_file, unreadable
from orthotrain.files.temporary import is_unfinished
from orthotrain.models.folder import MADE_BY


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a Lightning checkpoint without executing anything from it; every byte is compared with its checksum.

    Raises:
        ConfigurationError: If the file is missing, a folder, damaged, or holds more than plain values and tensors.
    """
    return read_file(_file(path))


def describe_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return what a checkpoint says of itself without reading its tensors; of a distributed one what is no tensor.

    Raises:
        ConfigurationError: As :func:`read_checkpoint`, but for the values of tensors.
    """
    path = Path(path)
    return describe_file(path / REST if (path / REST).is_file() else _file(path))


def step_of(path: str | Path) -> int:
    """Return the optimizer step that a checkpoint was saved at.

    Raises:
        ConfigurationError: If it cannot be read or says no step.
    """
    step = describe_checkpoint(path).get("global_step", 0)
    if type(step) is not int or not 0 <= step < 1 << 62:
        raise unreadable(path, ValueError(f"its global_step is {str(step)[:40]!r}, which is no step"))
    return step


def refuse_run_folder(path: Path) -> None:
    """Refuse the folder of a run in the place of a checkpoint in it; that of a distributed checkpoint passes.

    Raises:
        ConfigurationError: Naming the newest checkpoint in it.
    """
    within = [] if (path / REST).exists() else newest_first([path])
    if within:
        raise ConfigurationError(f"checkpoint {str(path)!r} is a folder; the newest in it is {str(within[0])!r}")


def newest_first(folders: Iterable[Path]) -> list[Path]:
    """Return the checkpoints in folders, by the optimizer step that each says, then by the time it was written.

    A checkpoint that does not say its step comes before all others, so that whoever looks for the newest names it.

    Args:
        folders: Searched, with the folders in them, for ``*.ckpt``: files, and the folders of distributed checkpoints.
    """
    found = {path.resolve(): path for folder in folders if folder.is_dir() for path in folder.rglob("*.ckpt")}
    places: dict[Path, tuple[float, int]] = {}
    for path in found.values():
        if any(is_unfinished(parent) for parent in path.parents):
            continue
        try:
            time = path.stat().st_mtime_ns
        except OSError:  # a link that leads nowhere
            continue
        try:
            places[path] = (step_of(path), time)
        except ConfigurationError:
            places[path] = (float("inf"), time)
    return sorted(places, key=places.__getitem__, reverse=True)


def check_checkpoint(path: str | Path) -> None:
    """Make sure that a checkpoint, a file or the folder of a distributed one, is whole and holds no code.

    Every byte of a file is compared with its checksum (about a second per GB), a megabyte at a time.

    Raises:
        ConfigurationError: Naming what is wrong with it.
    """
    path = Path(path)
    if path.is_dir():
        check_shards(path)
        step_of(path)
    else:
        check_file(_file(path))
        step_of(path)


def check_finite(state: Mapping[str, Tensor], names: Iterable[str], origin: str = "the checkpoint") -> None:
    """Refuse trained values that are not finite: nothing computes with them, and no training mends them.

    Buffers may hold infinite values (a mask of attention does), parameters may not.

    Args:
        state: Tensors by name.
        names: Those that are parameters.
        origin: What they come from, for the message.

    Raises:
        ConfigurationError: Naming the first tensor that holds NaN or infinite values.
    """
    for name in names:
        values = state.get(name)
        if values is None or not values.is_floating_point() or values.is_meta or not values.numel():
            continue
        smallest, largest = torch.aminmax(values.detach().float() if values.dtype.itemsize == 1 else values.detach())
        if not bool(torch.isfinite(smallest) & torch.isfinite(largest)):
            what = "nothing but NaN" if bool(torch.isnan(values).all()) else "NaN or infinite values"
            raise ConfigurationError(f"{origin} holds {what} in {name}: its run had diverged; take an earlier one")


def compare_state(saved: dict[str, Any], expected: dict[str, Any]) -> str | None:
    """Describe in one line how two state dicts differ in names, shapes and kinds of numbers; None if they agree."""
    missing = [name for name in expected if name not in saved]
    unknown = [name for name in saved if name not in expected]
    shapes = [
        f"{name} is {_kind(saved[name])} there and {_kind(expected[name])} here"
        for name in expected
        if name in saved and isinstance(expected[name], Tensor) and not _alike(saved[name], expected[name])
    ]
    if not (missing or unknown or shapes):
        return None
    parts = [f"{len(shapes)} shapes differ ({shapes[0]})"] if shapes else []
    parts += [f"{len(missing)} tensors are not in it ({missing[0]})"] if missing else []
    parts += [f"{len(unknown)} of its tensors are not in the model ({unknown[0]})"] if unknown else []
    return visible("; ".join(parts))


def _alike(saved: Any, expected: Tensor) -> bool:
    if not isinstance(saved, Tensor) or saved.shape != expected.shape:
        return False
    return saved.dtype == expected.dtype or (saved.is_floating_point() and expected.is_floating_point())


def _kind(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"{tuple(value.shape)}" if value.is_floating_point() else f"{tuple(value.shape)} {value.dtype}"


def _file(path: str | Path) -> Path:
    local_path(path, "checkpoint")
    if Path(path).is_dir():
        refuse_run_folder(Path(path))
        raise needs_consolidating(path)
    if not Path(path).is_file():
        hint = MADE_BY.get(str(path), "give the path of a .ckpt file of a run")
        raise ConfigurationError(f"checkpoint {str(path)!r} is not a file; {hint}")
    return Path(path)
