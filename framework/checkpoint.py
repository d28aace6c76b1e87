"""Reading checkpoints: plain values and tensors only, never code."""

import io
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import torch

from orthotrain.errors import ConfigurationError

_DISTRIBUTED = (".metadata", "meta.pt")
"""What a folder of a distributed checkpoint holds beside the shards."""


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a Lightning checkpoint without executing anything from it.

    Raises:
        ConfigurationError: If the file is missing, truncated, or holds more than plain values and tensors.
    """
    if not Path(path).is_file():
        raise ConfigurationError(f"checkpoint {str(path)!r} is not a file; give the path of a .ckpt file of a run")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to ask for
        raise _unreadable(path, error) from error
    if not isinstance(checkpoint, dict):
        raise _unreadable(path, ValueError(f"it holds a {type(checkpoint).__name__} and not a dictionary"))
    return checkpoint


def check_checkpoint(path: str | Path) -> None:
    """Make sure that a checkpoint, a file or the folder of a distributed one, is whole and holds no code.

    Every byte of a file is compared with its checksum (about a second per GB).

    Raises:
        ConfigurationError: Naming what is wrong with it.
    """
    path = Path(path)
    if path.is_dir():
        _check_distributed(path)
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


def _check_distributed(path: Path) -> None:
    for name in _DISTRIBUTED:
        if not (path / name).is_file():
            raise ConfigurationError(f"checkpoint {str(path)!r} is a folder without {name}: it was not finished")
    read_checkpoint(path / "meta.pt")
    try:
        description = (path / ".metadata").read_bytes()
        _check_memo(description)
        metadata = _DescriptionUnpickler(io.BytesIO(description)).load()
        shards = {info.relative_path: info.offset + info.length for info in metadata.storage_data.values()}
    except Exception as error:
        raise _unreadable(path / ".metadata", error) from error
    for name, length in shards.items():
        if Path(name).name != name:
            raise _unreadable(path / ".metadata", ValueError(f"it names a file outside its folder, {name!r}"))
        if not (path / name).is_file() or (path / name).stat().st_size < length:
            raise ConfigurationError(f"checkpoint {str(path)!r} lacks {name} or a part of it; take an earlier one")


def _check_memo(description: bytes) -> None:
    """Refuse a pickle that numbers an object beyond what its length can hold.

    The unpickler makes its table of objects as long as the largest number says: a changed byte would ask for gigabytes.
    """
    for opcode, argument, _ in pickletools.genops(description):
        if opcode.name not in ("PUT", "BINPUT", "LONG_BINPUT"):
            continue
        if isinstance(argument, int) and argument > len(description):
            raise pickle.UnpicklingError(f"it numbers an object {argument} in {len(description)} bytes")


class _DescriptionUnpickler(pickle.Unpickler):
    """Builds what torch writes to describe a distributed checkpoint, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """Return one of the few classes and functions that a description is made of."""
        allowed: dict[str, set[str]] = {
            "torch.distributed.checkpoint.metadata": {
                *("Metadata", "MetadataIndex", "BytesStorageMetadata", "TensorStorageMetadata", "StorageMeta"),
                *("TensorProperties", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"),
            },
            "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "StorageMeta"},
            "torch": {"Size", "float32", "float64", "float16", "bfloat16", "int64", "int32", "int8", "uint8", "bool"},
            "torch.serialization": {"_get_layout"},
            "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath"},
            "collections": {"OrderedDict"},
        }
        if name not in allowed.get(module, set()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no part of a description")
        return super().find_class(module, name)


def _unreadable(path: str | Path, error: Exception) -> ConfigurationError:
    reason = (str(error).strip() or "it is empty").splitlines()[0]
    return ConfigurationError(f"checkpoint {str(path)!r} cannot be read: {reason}; take an earlier one")
