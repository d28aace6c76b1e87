"""Reads checkpoint files without running code from them, finds the newest checkpoints, and compares state dicts."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orthotrain.checkpoints.shards import REST, check_shards
from orthotrain.checkpoints.writing import needs_consolidating
from orthotrain.errors import ConfigurationError, visible
from orthotrain.files.atomic_writes import is_unfinished
from orthotrain.files.paths import local_path
from orthotrain.files.pickle_classes import is_count
from orthotrain.files.torch_files import check_file, describe_file, read_file, unreadable
from orthotrain.models.folder import MADE_BY


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a Lightning checkpoint. No code from the file is run, and every byte is compared with its checksum.

    Raises:
        ConfigurationError: The path is missing or a folder, or the file is damaged or holds more than plain values and
            tensors.
    """
    return read_file(_checkpoint_file(path))


def describe_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return a checkpoint with a ``StoredTensor`` in the place of each tensor. No tensor is read.

    Of a distributed checkpoint, the result has everything except the sharded tensors.

    Raises:
        ConfigurationError: As :func:`read_checkpoint`, except that the values of tensors are not checked.
    """
    path = Path(path)
    return describe_file(path / REST if (path / REST).is_file() else _checkpoint_file(path))


def step_of(path: str | Path) -> int:
    """Return the optimizer step at which a checkpoint was saved.

    Raises:
        ConfigurationError: The checkpoint cannot be read, or its ``global_step`` is not a count.
    """
    step = describe_checkpoint(path).get("global_step", 0)
    if not is_count(step):
        raise unreadable(path, ValueError(f"its global_step is {str(step)[:40]!r}, not a count"))
    return step


def refuse_run_folder(path: Path) -> None:
    """Refuse a folder that contains checkpoints. The folder of a distributed checkpoint passes.

    Raises:
        ConfigurationError: The message names the newest checkpoint in the folder.
    """
    found = [] if (path / REST).exists() else newest_first([path])
    if found:
        raise ConfigurationError(f"checkpoint {str(path)!r} is a folder; the newest in it is {str(found[0])!r}")


def newest_first(folders: Iterable[Path]) -> list[Path]:
    """Return the checkpoints in folders, sorted by optimizer step and then by time of writing.

    A checkpoint whose step cannot be read comes first, so that a caller who looks for the newest one reports it.

    Args:
        folders: Folders that are searched, with their subfolders, for ``*.ckpt``: files, and folders of distributed
            checkpoints.
    """
    found = {path.resolve(): path for folder in folders if folder.is_dir() for path in folder.rglob("*.ckpt")}
    ages: dict[Path, tuple[float, int]] = {}
    for path in found.values():
        if any(is_unfinished(parent) for parent in path.parents):
            continue
        try:
            time = path.stat().st_mtime_ns
        except OSError:  # a link to a missing file
            continue
        try:
            ages[path] = (step_of(path), time)
        except ConfigurationError:
            ages[path] = (float("inf"), time)
    return sorted(ages, key=ages.__getitem__, reverse=True)


def check_checkpoint(path: str | Path) -> None:
    """Check that a checkpoint, a file or the folder of a distributed one, is complete and holds no code.

    Every byte is compared with its checksum (about a second per GB), a few megabytes at a time.

    Raises:
        ConfigurationError: The checkpoint is missing, damaged or hostile.
    """
    path = Path(path)
    if path.is_dir():
        check_shards(path)
    else:
        check_file(_checkpoint_file(path))
    step_of(path)


def check_finite(state: Mapping[str, Tensor], names: Iterable[str], origin: str = "the checkpoint") -> None:
    """Refuse parameters that are not finite: training cannot recover from them.

    Buffers may hold infinite values, as an attention mask does.

    Args:
        state: Tensors by name.
        names: Names of the parameters.
        origin: Where the tensors come from, for the message.

    Raises:
        ConfigurationError: A parameter holds NaN or infinite values; the message names the first one.
    """
    for name in names:
        values = state.get(name)
        if values is None or not values.is_floating_point() or values.is_meta or not values.numel():
            continue
        smallest, largest = torch.aminmax(values.detach().float() if values.dtype.itemsize == 1 else values.detach())
        if not bool(torch.isfinite(smallest) & torch.isfinite(largest)):
            found = "nothing but NaN" if bool(torch.isnan(values).all()) else "NaN or infinite values"
            raise ConfigurationError(f"{origin} holds {found} in {name}: its run had diverged; take an earlier one")


def compare_state(saved: Mapping[str, Any], expected: Mapping[str, Any]) -> str | None:
    """Describe in one line how two state dicts differ in names, shapes and integer dtypes; None if they do not."""
    missing = [name for name in expected if name not in saved]
    unknown = [name for name in saved if name not in expected]
    shapes = [
        f"{name} is {_shape_of(saved[name])} there and {_shape_of(expected[name])} here"
        for name in expected
        if name in saved and isinstance(expected[name], Tensor) and not _is_like(saved[name], expected[name])
    ]
    if not (missing or unknown or shapes):
        return None
    parts = [f"{len(shapes)} shapes differ ({shapes[0]})"] if shapes else []
    parts += [f"{len(missing)} tensors are not in it ({missing[0]})"] if missing else []
    parts += [f"{len(unknown)} of its tensors are not in the model ({unknown[0]})"] if unknown else []
    return visible("; ".join(parts))


def _is_like(saved: Any, expected: Tensor) -> bool:
    if not isinstance(saved, Tensor) or saved.shape != expected.shape:
        return False
    return saved.dtype == expected.dtype or (saved.is_floating_point() and expected.is_floating_point())


def _shape_of(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"{tuple(value.shape)}" if value.is_floating_point() else f"{tuple(value.shape)} {value.dtype}"


def _checkpoint_file(path: str | Path) -> Path:
    local_path(path, "checkpoint")
    if Path(path).is_dir():
        refuse_run_folder(Path(path))
        raise needs_consolidating(path)
    if not Path(path).is_file():
        hint = MADE_BY.get(str(path), "give the path of a .ckpt file of a run")
        raise ConfigurationError(f"checkpoint {str(path)!r} is not a file; {hint}")
    return Path(path)
