"""Folders with a model: what their index may name, files beside it and nothing elsewhere, and how they are written."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

from orthotrain.errors import ConfigurationError
from orthotrain.failures import naming

MADE_BY = {
    "models/smollm2-135m-instruct": "`make smollm2` makes it",
    "runs/quickstart/checkpoints/last.ckpt": "`make fit` makes it",
}
"""What the shipped configs start from, and the command that makes it."""


def check_there(name: str | Path) -> None:
    """Refuse a path that is not there before a hub is asked for it, again and again.

    Args:
        name: A path, or a hub name (``org/name``), which passes.

    Raises:
        ConfigurationError: Naming what is not there and, where it is known, the command that makes it.
    """
    path = Path(name).expanduser()
    first, *rest = path.parts or ("",)
    ours = first in ("models", "runs") or Path(first).is_dir()  # of the many names that may be either
    named = path.is_absolute() or str(name).startswith(".") or path.suffix == ".ckpt"
    local = named or len(rest) > 1 or (bool(rest) and ours)
    if local and not path.exists():
        hint = MADE_BY.get(str(name), "name one that is there, or a model of the hub in the form org/name")
        raise ConfigurationError(f"no file or folder {str(name)!r}: {hint}")


def check_model_folder(folder: str | Path) -> None:
    """Refuse a model folder whose index of weight files leads out of it.

    A sharded model has ``model.safetensors.index.json``, which maps every tensor to a file; loaders join that name to
    the folder. Anything else than a folder (a hub name) passes.

    Args:
        folder: The folder, or the hub name, of a pretrained model.

    Raises:
        ConfigurationError: If an index is not JSON, has no such map, or names a file outside the folder; or if
            it is a path that is not there.
    """
    check_there(folder)
    folder = Path(folder)
    if not folder.is_dir():
        return
    for index in sorted(folder.glob("*.index.json")):
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigurationError(f"{str(index)!r} is no index of weight files: {error!r}") from error
        for name in names:
            _check_name(name, index)
            target = folder / name
            if target.is_symlink() and not target.exists():
                raise ConfigurationError(f"{str(index)!r} names {name!r}, a link that leads nowhere")


def check_new_folder(folder: str | Path) -> None:
    """Refuse to write over what is there.

    Raises:
        ConfigurationError: If the folder exists and is not empty.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigurationError(f"--out {str(folder)!r} exists and is not empty: name a new folder")


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield the path of a folder to make, which takes the place of ``folder`` when all of it is written.

    Its files are then readable for whom the umask lets read what is made there. If anything fails, nothing is left.

    Raises:
        ConfigurationError: See :func:`check_new_folder`.
        OSError: If it cannot be written (a full disk), naming ``folder``.
    """
    check_new_folder(folder)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        with naming(folder):
            yield partial
            for path in partial.iterdir():
                if path.is_file():  # safetensors makes files that their owner alone can read
                    path.chmod(0o666 & partial.stat().st_mode)
            if folder.exists():
                folder.rmdir()
            partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _check_name(name: object, index: Path) -> None:
    if (
        not isinstance(name, str)
        or name in ("", ".", "..")
        or "\0" in name
        or {PurePosixPath(name).name, PureWindowsPath(name).name} != {name}
    ):
        raise ConfigurationError(f"{str(index)!r} names {name!r}, which is not a file of its own folder")
