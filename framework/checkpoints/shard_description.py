"""Reader of the ``.metadata`` file of a distributed checkpoint: where each part of each tensor is stored."""

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from orthotrain.files.paths import is_file_name
from orthotrain.files.pickle_classes import is_count
from orthotrain.files.pickle_interpreter import Interpreter, UnknownName, require
from orthotrain.files.torch_files import unreadable

DESCRIPTION = ".metadata"
_MOST_BYTES = 1 << 28
_METADATA = "torch.distributed.checkpoint.metadata"
_RECORDS = {
    **dict.fromkeys(("Metadata", "MetadataIndex", "BytesStorageMetadata", "TensorStorageMetadata"), _METADATA),
    **dict.fromkeys(("TensorProperties", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"), _METADATA),
    "_StorageInfo": "torch.distributed.checkpoint.filesystem",
}


class _Record:
    """One object of torch in the description: the name of its class, and its fields by name or by number."""

    def __init__(self, kind: str, *arguments: Any) -> None:
        self.kind, self.fields = kind, {number: value for number, value in enumerate(arguments)}

    def __getitem__(self, name: Any) -> Any:
        return self.fields.get(name)


def read_shard_description(folder: Path) -> Metadata:
    """Return the description of the shards in a folder, built from plain values. No class that it names is imported.

    Raises:
        ConfigurationError: The description is damaged, names other classes, or describes more than its files hold.
    """
    path = folder / DESCRIPTION
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError("it has more bytes than the description of any checkpoint")
        root = Interpreter(
            path.read_bytes(), _known, set_state=_give_state, is_key=lambda key: _is(key, "MetadataIndex")
        ).run()
        if not _is(root, "Metadata"):
            raise ValueError(f"it holds a {getattr(root, 'name', type(root).__name__)}, not a description of shards")
        metadata = Metadata(
            {_text(name): _entry(entry) for name, entry in _table(root["state_dict_metadata"])},
            {_text(name): keys for name, keys in _table(root["planner_data"] or {})},
            dict(_location(index, info) for index, info in _table(root["storage_data"])),
            StorageMeta(),
        )
        _check_keys(metadata)
        _check_extents(metadata, folder)
    except Exception as error:
        raise unreadable(path, error) from error
    return metadata


def own_name(name: Any) -> str:
    """Return a file name, after checking that the file is in the folder itself.

    Raises:
        ValueError: The name leads outside of the folder.
    """
    if not is_file_name(name):
        raise ValueError(f"it names a file outside its folder, {name!r}")
    return name


def _known(module: str, name: str) -> Any:
    if _RECORDS.get(name) == module or name == "StorageMeta":
        return lambda *arguments: _Record(name, *arguments)
    if module == "torch" and isinstance(found := vars(torch).get(name), torch.dtype):
        return found
    if (module, name) == ("torch", "Size"):
        return lambda values: torch.Size(_counts(values))
    if (module, name) in (("torch.serialization", "_get_layout"), ("pathlib", "PosixPath"), ("pathlib", "WindowsPath")):
        return lambda *arguments: None
    if (module, name) in (("pathlib", "PurePosixPath"), ("collections", "OrderedDict")):
        return lambda *arguments: {}
    return UnknownName(f"{module}.{name}")


def _give_state(target: Any, state: Any) -> None:
    if not isinstance(target, _Record):
        raise ValueError(f"it sets a state on a {type(target).__name__}, which has none")
    target.fields.update(state if isinstance(state, dict) else enumerate(state))


def _is(value: Any, kind: str) -> bool:
    return isinstance(value, _Record) and value.kind == kind


def _table(value: Any) -> Any:
    require(isinstance(value, dict))
    return value.items()


def _text(value: Any) -> str:
    require(isinstance(value, str))
    return value


def _count(value: Any) -> int:
    if not is_count(value):
        raise ValueError(f"it has {str(value)[:40]!r} instead of a count")
    return value


def _counts(values: Any) -> list[int]:
    require(isinstance(values, tuple | list) and len(values) <= 64)
    return [_count(value) for value in values]


def _entry(entry: Any) -> Any:
    if _is(entry, "BytesStorageMetadata"):
        return BytesStorageMetadata()
    require(_is(entry, "TensorStorageMetadata") and _is(entry["properties"], "TensorProperties"))
    dtype, chunks = entry["properties"][0], entry["chunks"]
    require(isinstance(dtype, torch.dtype) and isinstance(chunks, list))
    require(all(_is(chunk, "ChunkStorageMetadata") for chunk in chunks))
    parts = [
        ChunkStorageMetadata(torch.Size(_counts(chunk["offsets"])), torch.Size(_counts(chunk["sizes"])))
        for chunk in chunks
    ]
    return TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(_counts(entry["size"])), parts)


def _location(index: Any, info: Any) -> tuple[MetadataIndex, _StorageInfo]:
    require(_is(index, "MetadataIndex") and _is(info, "_StorageInfo") and not info["transform_descriptors"])
    offset = None if index["offset"] is None else _counts(index["offset"])
    number = None if index["index"] is None else _count(index["index"])
    storage = _StorageInfo(own_name(info["relative_path"]), _count(info["offset"]), _count(info["length"]))
    return MetadataIndex(_text(index["fqn"]), offset, number), storage


def _check_keys(metadata: Metadata) -> None:
    """Refuse an index of a list that is not below the number of entries: torch fills lists up to the largest index."""
    entries = len(metadata.state_dict_metadata)
    for keys in metadata.planner_data.values():
        known = isinstance(keys, tuple) and 0 < len(keys) <= 64
        if not known or not all(isinstance(key, str) or (is_count(key) and key < entries) for key in keys):
            raise ValueError(f"it names an entry {str(keys)[:80]!r}, and has {entries} entries")


def _check_extents(metadata: Metadata, folder: Path) -> None:
    """Refuse parts that share bytes of a file, and tensors that are larger than their parts."""
    parts: dict[str, list[tuple[int, int]]] = defaultdict(list)
    held: dict[str, int] = defaultdict(int)
    for index, info in metadata.storage_data.items():
        parts[info.relative_path].append((info.offset, info.length))
        held[index.fqn] += info.length
    for name, extents in parts.items():
        if not (folder / name).is_file():
            raise ValueError(f"it names {name!r}, which is not a file of its folder")
        end = (folder / name).stat().st_size
        for offset, length in sorted(extents, reverse=True):
            if offset + length > end:
                raise ValueError(f"parts of {name} overlap or end beyond its end")
            end = offset
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue
        values = math.prod(entry.size)
        if values != sum(math.prod(chunk.sizes) for chunk in entry.chunks):
            raise ValueError(f"the parts of {name} do not add up to its shape {tuple(entry.size)}")
        if values * entry.properties.dtype.itemsize > held[name]:
            raise ValueError(f"{name} of shape {tuple(entry.size)} is larger than its parts")
