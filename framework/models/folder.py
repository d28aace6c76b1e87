"""Model folders: checks of paths and of the files in a folder before it is read, and writing of new folders."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from orthotrain.console.failures import naming
from orthotrain.errors import ConfigurationError
from orthotrain.files.atomic_writes import check_name_length, discard, make_temporary_folder
from orthotrain.files.paths import check_folder_files, check_regular_file, is_file_name, local_path, read_json

_MOST_HEADER_BYTES = 32 << 20

MADE_BY = {
    "models/smollm2-135m-instruct": "`make smollm2` makes it",
    "runs/quickstart/checkpoints/last.ckpt": "`make fit` makes it",
}
"""Paths that the shipped configs start from -> the command that creates them."""


def check_there(name: str | Path) -> None:
    """Refuse a missing path, before a library takes it for a hub name and asks the hub for it.

    Args:
        name: A path, or a hub name (``org/name``), which passes.

    Raises:
        ConfigurationError: The message gives the path and, if known, the command that creates it.
    """
    path = local_path(name, "path")
    first, *rest = path.parts or ("",)
    ours = first in ("models", "runs") or Path(first).is_dir()  # "a/b" may be a path or a hub name
    named = path.is_absolute() or str(name).startswith(".") or path.suffix == ".ckpt"
    local = named or len(rest) > 1 or (bool(rest) and ours)
    if local and not path.exists():
        hint = MADE_BY.get(
            str(name),
            "give an existing path (--base for a base model that has moved), or a model "
            "of the hub in the form org/name",
        )
        raise ConfigurationError(f"no file or folder {str(name)!r}: {hint}")


def check_model_folder(folder: str | Path) -> None:
    """Refuse a model folder with an index of weight files that names a file outside of the folder.

    A sharded model has ``model.safetensors.index.json``, which maps every tensor to a file name. Loaders join the name
    to the folder. A hub name passes.

    Args:
        folder: Folder or hub name of a pretrained model.

    Raises:
        ConfigurationError: The path is missing; or an index is not JSON, has no such map, or names a file outside of
            the folder.
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
            raise ConfigurationError(f"{str(index)!r} is not an index of weight files: {error!r}") from error
        for name in names:
            if not is_file_name(name):
                raise ConfigurationError(f"{str(index)!r} names {name!r}, which is not a file of its own folder")
            target = folder / name
            if target.is_symlink() and not target.exists():
                raise ConfigurationError(f"{str(index)!r} names {name!r}, a link to a missing file")
    for weights in sorted(folder.glob("*.safetensors")):
        check_regular_file(weights, "model weights")
        _check_tensor_names(weights)


def check_new_folder(folder: str | Path) -> None:
    """Refuse a folder that is not new: writing must not overwrite anything.

    Raises:
        ConfigurationError: The folder exists and is not empty, is a link, or has a name that is too long.
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
    """Yield a temporary folder, which is renamed to ``folder`` at the end of the block.

    The files get the permissions of the umask. If anything fails, the temporary folder is deleted.

    Raises:
        ConfigurationError: See :func:`check_new_folder`.
        OSError: The folder cannot be written, for example on a full disk; the message names ``folder``.
    """
    check_new_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = make_temporary_folder(folder)
    try:
        with naming(folder):
            yield temporary
            for path in temporary.iterdir():
                if path.is_file():  # safetensors creates files that only their owner can read
                    path.chmod(0o666 & temporary.stat().st_mode)
            check_new_folder(folder)
            if folder.exists():
                folder.rmdir()
            temporary.rename(folder)
    finally:
        discard(temporary)


def _check_tensor_names(file: Path) -> None:
    """Refuse tensor names with control characters: transformers prints the names of tensors that a network lacks.

    A file that is not a safetensors file passes, because loading it raises a clear error.
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
