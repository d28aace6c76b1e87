"""The ``.metadata`` of a distributed checkpoint: which part of which file holds which part of which tensor."""

import math
import os
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

from orthotrain.files.plain_files import unreadable
from orthotrain.files.plain_pickle import Foreign, Interpreter

DESCRIPTION = ".metadata"
_MOST_BYTES = 1 << 28
_METADATA = "torch.distributed.checkpoint.metadata"
_RECORDS = {
    **dict.fromkeys(("Metadata", "MetadataIndex", "BytesStorageMetadata", "TensorStorageMetadata"), _METADATA),
    **dict.fromkeys(("TensorProperties", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"), _METADATA),
    "_StorageInfo": "torch.distributed.checkpoint.filesystem",
}


class _Record:
    """What the description says of one object of torch: its class, and its fields by name or in order."""

    def __init__(self, kind: str, *arguments: Any) -> None:
        self.kind, self.fields = kind, {number: value for number, value in enumerate(arguments)}

    def __getitem__(self, name: Any) -> Any:
        return self.fields.get(name)


def read_shard_description(folder: Path) -> Metadata:
    """Return what describes the shards of a folder, rebuilt from plain values; no class that it names is imported.

    Raises:
        ConfigurationError: If it is damaged, asks for anything else, or describes more than its files hold.
    """
    path = folder / DESCRIPTION
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError("it is larger than the description of any checkpoint")
        root = Interpreter(
            path.read_bytes(), _known, build=_give_state, plain_key=lambda key: _is(key, "MetadataIndex")
        ).run()
        if not _is(root, "Metadata"):
            raise ValueError(f"it holds a {getattr(root, 'name', type(root).__name__)} and no description of shards")
        metadata = Metadata(
            {_text(name): _entry(entry) for name, entry in _table(root["state_dict_metadata"])},
            {_text(name): _place(place) for name, place in _table(root["planner_data"] or {})},
            dict(_location(index, info) for index, info in _table(root["storage_data"])),
            StorageMeta(),
        )
        _check_places(metadata)
        _check_extents(metadata, folder)
    except Exception as error:
        raise unreadable(path, error) from error
    return metadata


def own_name(name: Any) -> str:
    """Return the name of a file of the folder itself.

    Raises:
        ValueError: If the name leads elsewhere.
    """
    if not isinstance(name, str) or Path(name).name != name or "\\" in name or "\0" in name or name == os.pardir:
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
    return Foreign(f"{module}.{name}")


def _give_state(target: Any, state: Any) -> None:
    if not isinstance(target, _Record):
        raise ValueError(f"it gives a state to a {type(target).__name__}, which has none")
    target.fields.update(state if isinstance(state, dict) else enumerate(state))


def _is(value: Any, kind: str) -> bool:
    return isinstance(value, _Record) and value.kind == kind


def _table(value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError("its description is cut or garbled")
    return value.items()


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("its description is cut or garbled")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise ValueError(f"it has {str(value)[:40]!r} where a count belongs")
    return value


def _counts(values: Any) -> list[int]:
    if not isinstance(values, tuple | list) or len(values) > 64:
        raise ValueError("its description is cut or garbled")
    return [_count(value) for value in values]


def _entry(entry: Any) -> Any:
    if _is(entry, "BytesStorageMetadata"):
        return BytesStorageMetadata()
    if not _is(entry, "TensorStorageMetadata") or not _is(entry["properties"], "TensorProperties"):
        raise ValueError("its description is cut or garbled")
    dtype = entry["properties"][0]
    chunks = entry["chunks"]
    if not isinstance(dtype, torch.dtype) or not isinstance(chunks, list):
        raise ValueError("its description is cut or garbled")
    if not all(_is(chunk, "ChunkStorageMetadata") for chunk in chunks):
        raise ValueError("its description is cut or garbled")
    parts = [
        ChunkStorageMetadata(torch.Size(_counts(chunk["offsets"])), torch.Size(_counts(chunk["sizes"])))
        for chunk in chunks
    ]
    return TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(_counts(entry["size"])), parts)


def _place(place: Any) -> tuple[Any, ...]:
    if not isinstance(place, tuple) or not 0 < len(place) <= 64:
        raise ValueError(f"it names a place {str(place)[:80]!r}")
    return place


def _location(index: Any, info: Any) -> tuple[MetadataIndex, _StorageInfo]:
    if not _is(index, "MetadataIndex") or not _is(info, "_StorageInfo") or info["transform_descriptors"]:
        raise ValueError("its description is cut or garbled")
    offset = None if index["offset"] is None else _counts(index["offset"])
    number = None if index["index"] is None else _count(index["index"])
    where = _StorageInfo(own_name(info["relative_path"]), _count(info["offset"]), _count(info["length"]))
    return MetadataIndex(_text(index["fqn"]), offset, number), where


def _check_places(metadata: Metadata) -> None:
    """Refuse a place in a list beyond the number of entries: lists are made as long as the largest number says."""
    entries = len(metadata.state_dict_metadata)
    for place in metadata.planner_data.values():
        if not all(isinstance(part, str) or (type(part) is int and 0 <= part < entries) for part in place):
            raise ValueError(f"it names a place {place!r} among {entries} entries")


def _check_extents(metadata: Metadata, folder: Path) -> None:
    """Refuse parts that share bytes of a file, or that are fewer than the tensor that they make up."""
    parts: dict[str, list[tuple[int, int]]] = defaultdict(list)
    held: dict[str, int] = defaultdict(int)
    for index, info in metadata.storage_data.items():
        parts[info.relative_path].append((info.offset, info.length))
        held[index.fqn] += info.length
    for name, extents in parts.items():
        if not (folder / name).is_file():
            raise ValueError(f"it names {name!r}, not a file of its folder")
        end = (folder / name).stat().st_size
        for offset, length in sorted(extents, reverse=True):
            if offset + length > end:
                raise ValueError(f"parts of {name} overlap or lie beyond its end")
            end = offset
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue
        values = math.prod(entry.size)
        if values != sum(math.prod(chunk.sizes) for chunk in entry.chunks):
            raise ValueError(f"the parts of {name} do not make up its shape {tuple(entry.size)}")
        if values * entry.properties.dtype.itemsize > held[name]:
            raise ValueError(f"{name} of shape {tuple(entry.size)} is larger than its parts")
