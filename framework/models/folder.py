"""Folders with a model: what their index may name, files beside it and nothing elsewhere, and how they are written."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

from orthotrain.console.failures import naming
from orthotrain.errors import ConfigurationError
from orthotrain.files.atomic_writes import check_name_length, discard, make_temporary_folder
from orthotrain.files.paths import check_folder_files, local_path, read_json

_MOST_HEADER_BYTES = 32 << 20

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
    path = local_path(name, "path")
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
    check_folder_files(folder, "model folder")
    for index in sorted(folder.glob("*.index.json")):
        try:
            names = set(read_json(index, "index of weight files")["weight_map"].values())
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigurationError(f"{str(index)!r} is no index of weight files: {error!r}") from error
        for name in names:
            _check_name(name, index)
            target = folder / name
            if target.is_symlink() and not target.exists():
                raise ConfigurationError(f"{str(index)!r} names {name!r}, a link that leads nowhere")
    for weights in sorted(folder.glob("*.safetensors")):
        _check_tensor_names(weights)


def check_new_folder(folder: str | Path) -> None:
    """Refuse to write over what is there.

    Raises:
        ConfigurationError: If the folder exists and is not empty, or its name is too long.
    """
    folder = Path(folder)
    local_path(folder, "--out")
    check_name_length(folder)
    if folder.is_symlink():
        raise ConfigurationError(f"--out {str(folder)!r} is a link: name the folder itself")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigurationError(f"--out {str(folder)!r} exists and is not empty: name a new folder")


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield the path of a new, empty folder, which takes the place of ``folder`` when all of it is written.

    Its files are then readable for whom the umask lets read what is made there. If anything fails, nothing is left.

    Raises:
        ConfigurationError: See :func:`check_new_folder`.
        OSError: If it cannot be written (a full disk), naming ``folder``.
    """
    check_new_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = make_temporary_folder(folder)
    try:
        with naming(folder):
            yield partial
            for path in partial.iterdir():
                if path.is_file():  # safetensors makes files that their owner alone can read
                    path.chmod(0o666 & partial.stat().st_mode)
            check_new_folder(folder)
            if folder.exists():
                folder.rmdir()
            partial.rename(folder)
    finally:
        discard(partial)


def _check_tensor_names(file: Path) -> None:
    """Refuse names that a terminal would obey: transformers prints those of tensors that a network does not have.

    What is no safetensors file passes: whoever loads the file says why.
    """
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = stream.read(length) if length <= _MOST_HEADER_BYTES else b""
    try:
        names = list(json.loads(header))
    except (ValueError, TypeError, RecursionError):
        return
    if strange := [name for name in names if not name.isprintable()]:
        raise ConfigurationError(f"{str(file)!r} names a tensor {strange[0]!r:.200}, which has control characters")


def _check_name(name: object, index: Path) -> None:
    if (
        not isinstance(name, str)
        or name in ("", ".", "..")
        or "\0" in name
        or {PurePosixPath(name).name, PureWindowsPath(name).name} != {name}
    ):
        raise ConfigurationError(f"{str(index)!r} names {name!r}, which is not a file of its own folder")
