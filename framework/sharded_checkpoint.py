"""Distributed checkpoints: a folder with the shards of every rank, complete or not there, read without running code."""

import io
import json
import os
import pickle
import pickletools
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from orthotrain.checkpoint_io import partial_of, publish, reason_of, remove_leftovers
from orthotrain.errors import ConfigurationError
from orthotrain.progress import Progress, bytes_in

DESCRIPTION, REST, SUMS = ".metadata", "meta.pt", "checksums.json"
"""What lies beside the shards: torch's description of them, what is no tensor, and the checksum of every file."""


def save_shards(state: dict[str, Any], rest: dict[str, Any], path: Path, on_any_rank: Callable[[bool], bool]) -> None:
    """Write a distributed checkpoint beside its place and give it its name when all of it is on the disk.

    A collective: every rank writes its own shards. Each file's checksum goes into a plain index.

    Args:
        state: Nested dictionaries of tensors, sharded or the same on all ranks.
        rest: Plain values and tensors, the same on all ranks; rank 0 writes them.
        path: The folder; one of that name is replaced.
        on_any_rank: Tells whether some rank has failed.

    Raises:
        ConfigurationError: On every rank, if some rank cannot write; older checkpoints are intact.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    partial = partial_of(path)
    failure: BaseException | None = None
    try:
        if first:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(path.parent)
            partial.mkdir()
    except OSError as error:
        failure = error
    if not on_any_rank(failure is not None):
        try:
            dcp.save(state, checkpoint_id=partial)
            _write_sums(partial, rest, first)
        except (Exception, dcp.CheckpointException) as error:  # torch's is a BaseException
            failure = error
    if on_any_rank(failure is not None):
        if first:
            shutil.rmtree(partial, ignore_errors=True)
        reason = "another rank failed" if failure is None else reason_of(_cause(failure))
        raise ConfigurationError(
            f"checkpoint {str(path)!r} cannot be written ({reason}); the older ones are intact: make room and go on "
            "with --ckpt_path last"
        ) from failure
    if first:
        publish(partial, path)
    on_any_rank(False)  # no rank goes on before the folder has its name


def _write_sums(folder: Path, rest: dict[str, Any], first: bool) -> None:
    """Let every rank sum the files that it wrote, and rank 0 write the index of all."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    own = list(folder.glob(f"__{rank}_*"))
    if first:
        torch.save(rest, folder / REST)
        own += [folder / DESCRIPTION, folder / REST]
    sums = {file.name: [file.stat().st_size, _crc(file)] for file in own}
    everyone: list[Any] = [sums] * ranks
    if ranks > 1:
        dist.all_gather_object(everyone, sums)
    if first:
        index = {name: entry for part in everyone for name, entry in sorted(part.items())}
        (folder / SUMS).write_text(json.dumps(index, indent=1), encoding="utf-8")


def check_shards(path: Path) -> Metadata:
    """Compare every file of a distributed checkpoint with its checksum and return what describes the shards.

    Raises:
        ConfigurationError: Naming what is missing, changed or hostile.
    """
    for name in (DESCRIPTION, REST, SUMS):
        if not (path / name).is_file():
            raise ConfigurationError(f"checkpoint {str(path)!r} is a folder without {name}: it was not finished")
    try:
        index = json.loads((path / SUMS).read_text(encoding="utf-8"))
        sums = {_own_name(name): (int(size), int(crc)) for name, (size, crc) in index.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path / SUMS, error) from error
    with Progress("checking the shards", bytes_in(path)) as bar:
        for name, expected in {**{DESCRIPTION: None, REST: None}, **sums}.items():
            file = path / name
            if not file.is_file() or (file.stat().st_size, _crc(file, bar.advance)) != expected:
                raise _damaged(file, ValueError("it is missing or does not match its checksum"))
    metadata = read_description(path)
    for info in metadata.storage_data.values():
        if info.relative_path not in sums:
            raise _damaged(path / DESCRIPTION, ValueError(f"it names {info.relative_path!r}, not a file of its folder"))
    return metadata


def read_description(path: Path) -> Metadata:
    """Return what describes the shards of a folder, built from the few classes that torch writes there.

    Raises:
        ConfigurationError: If it is damaged or asks for anything else.
    """
    try:
        description = (path / DESCRIPTION).read_bytes()
        _check_memo(description)
        metadata = _DescriptionUnpickler(io.BytesIO(description)).load()
        assert isinstance(metadata, Metadata)
        entries = len(metadata.state_dict_metadata)
        for place in (metadata.planner_data or {}).values():
            # lists are made as long as the largest number says
            if not all(isinstance(p, str) or 0 <= int(p) < entries for p in place):
                raise ValueError(f"it names a place {place!r} among {entries} entries")
        for info in metadata.storage_data.values():
            _own_name(info.relative_path)
    except Exception as error:
        raise _damaged(path / DESCRIPTION, error) from error
    return metadata


class PlainLoadPlanner(DefaultLoadPlanner):
    """Loads tensors, and of the entries that are none plain values alone: torch's own runs any pickle."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put a plain value in its place."""
        plain = torch.load(value, weights_only=True)
        name = read_item.dest_index.fqn
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[name], plain)
        else:
            self.state_dict[name] = plain


class _WholePlanner(PlainLoadPlanner, _EmptyStateDictLoadPlanner):
    """Loads everything that a folder holds into an empty dictionary, and counts the bytes."""

    def __init__(self, advance: Callable[[float], None]) -> None:
        super().__init__()
        self.advance = advance

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Count what was read."""
        super().commit_tensor(read_item, tensor)
        self.advance(tensor.nbytes)


def load_shards(state: dict[str, Any], path: Path) -> None:
    """Fill a state dict in place from the shards of a folder; every rank reads what it needs.

    Args:
        state: Its tensors get the values; an empty one, in a process of its own, gets everything.
        path: A folder that :func:`check_shards` has passed.

    Raises:
        ConfigurationError: If something is missing, or an entry is no plain value.
    """
    try:
        if state:
            dcp.load(state, checkpoint_id=path, planner=PlainLoadPlanner(), no_dist=not dist.is_initialized())
        else:
            with Progress("reading the shards", bytes_in(path)) as bar:
                _load_state_dict(state, dcp.FileSystemReader(path), planner=_WholePlanner(bar.advance), no_dist=True)
    except (Exception, dcp.CheckpointException) as error:
        raise _damaged(path, error) from error


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


def _check_memo(description: bytes) -> None:
    """Refuse a pickle that numbers an object beyond what its length can hold.

    The unpickler makes its table of objects as long as the largest number says: a changed byte would ask for gigabytes.
    """
    for opcode, argument, _ in pickletools.genops(description):
        if opcode.name not in ("PUT", "BINPUT", "LONG_BINPUT"):
            continue
        if isinstance(argument, int) and argument > len(description):
            raise pickle.UnpicklingError(f"it numbers an object {argument} in {len(description)} bytes")


def _own_name(name: str) -> str:
    if Path(name).name != name or "\\" in name or "\0" in name or name == os.pardir:
        raise ValueError(f"it names a file outside its folder, {name!r}")
    return name


def _crc(file: Path, advance: Callable[[float], None] = lambda more: None) -> int:
    crc = 0
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            crc = zlib.crc32(block, crc)
            advance(len(block))
    return crc


def _damaged(path: Path, error: BaseException) -> ConfigurationError:
    reason = (str(_cause(error)).strip() or "it is empty").splitlines()[0]
    return ConfigurationError(f"checkpoint {str(path)!r} cannot be read: {reason}; take an earlier one")


def _cause(error: BaseException) -> BaseException:
    """Return what went wrong on some rank, where torch has collected the errors of all."""
    failures = getattr(error, "failures", {})
    return next(iter(failures.values()))[0] if failures else error
