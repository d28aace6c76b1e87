"""Distributed checkpoints: a folder with the shards of every rank, complete or not there, read without running code."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.futures import Future

from orthotrain.checkpoints.shard_description import DESCRIPTION, own_name, read_shard_description
from orthotrain.checkpoints.storable import storable
from orthotrain.checkpoints.writing import reason_of
from orthotrain.console.progress import Progress, bytes_in
from orthotrain.errors import ConfigurationError
from orthotrain.files.plain_files import crc32_of, read_part, unreadable
from orthotrain.files.temporary import discard, folder_beside, publish, remove_leftovers

REST, SUMS = "meta.pt", "checksums.json"
"""What lies beside the shards and torch's description: what is no tensor, and the checksum of every file."""

_MOST_SUMS = 1 << 26
_VERIFIED: set[tuple[Any, ...]] = set()
"""Folders whose files this process has compared with their checksums, as they were then."""


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
    partial = path
    failure: BaseException | None = None
    try:
        if first:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(path.parent)
            partial = folder_beside(path)
    except (OSError, ConfigurationError) as error:
        failure = error
    if not on_any_rank(failure is not None):
        partial = path.with_name(_of_rank_0(partial.name))
        try:
            dcp.save(state, checkpoint_id=partial)
            _write_sums(partial, rest, first)
        except (Exception, dcp.CheckpointException) as error:  # torch's is a BaseException
            failure = error
    if on_any_rank(failure is not None):
        if first and partial != path:
            discard(partial)
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
        torch.save(storable(rest), folder / REST)
        own += [folder / DESCRIPTION, folder / REST]
    sums = {file.name: [file.stat().st_size, crc32_of(file)] for file in own}
    everyone: list[Any] = [sums] * ranks
    if ranks > 1:
        dist.all_gather_object(everyone, sums)
    if first:
        index = {name: entry for part in everyone for name, entry in sorted(part.items())}
        (folder / SUMS).write_text(json.dumps(index, indent=1), encoding="utf-8")


def _of_rank_0(name: str) -> str:
    """Return the name that rank 0 has drawn; a collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return name
    names: list[Any] = [name] * dist.get_world_size()
    dist.all_gather_object(names, name)
    return names[0]


def check_shards(path: Path) -> Metadata:
    """Compare every file of a distributed checkpoint with its checksum and return what describes the shards.

    Files that this process has compared before, and that have not changed since, are not read again.

    Raises:
        ConfigurationError: Naming what is missing, changed or hostile.
    """
    for name in (DESCRIPTION, REST, SUMS):
        if not (path / name).is_file():
            raise ConfigurationError(f"checkpoint {str(path)!r} is a folder without {name}: it was not finished")
    try:
        if (path / SUMS).stat().st_size > _MOST_SUMS:
            raise ValueError("it is larger than the checksums of any checkpoint")
        index = json.loads((path / SUMS).read_text(encoding="utf-8"))
        sums = {own_name(name): (int(size), int(crc)) for name, (size, crc) in index.items()}
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise unreadable(path / SUMS, error) from error
    expected = {**dict.fromkeys((DESCRIPTION, REST)), **sums}
    state = (str(path), *(_state_of(path / name) for name in (SUMS, *expected)))
    if state not in _VERIFIED:
        with Progress("checking the shards", bytes_in(path)) as bar:
            for name, sum_ in expected.items():
                file = path / name
                if not file.is_file() or sum_ is None or file.stat().st_size != sum_[0]:
                    raise unreadable(file, ValueError("it is missing or does not match its checksum"))
                if crc32_of(file, bar.advance) != sum_[1]:
                    raise unreadable(file, ValueError("it is missing or does not match its checksum"))
        _VERIFIED.add(state)
    metadata = read_shard_description(path)
    for info in metadata.storage_data.values():
        if info.relative_path not in sums:
            raise unreadable(
                path / DESCRIPTION, ValueError(f"it names {info.relative_path!r}, not a file of its folder")
            )
    return metadata


def _state_of(file: Path) -> tuple[int, ...] | None:
    """Return what changes when a file is written anew; None where there is no file."""
    if not file.is_file():
        return None
    found = file.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


class _PlainReader(dcp.FileSystemReader):
    """Reads the parts of a distributed checkpoint that are plain values and tensors: torch's own runs any pickle."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the description of the shards, which was checked."""
        metadata = read_shard_description(Path(self.path))
        assert metadata.storage_meta is not None
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what a plan asks for."""
        for item in sorted(plan.items, key=lambda item: self.storage_data[item.storage_index].relative_path):
            info = self.storage_data[item.storage_index]
            with (Path(self.path) / info.relative_path).open("rb") as file:
                file.seek(info.offset)
                part = io.BytesIO(file.read(info.length))
            if item.type == LoadItemType.BYTE_IO:
                planner.load_bytes(item, part)
                continue
            value = read_part(part)
            if not isinstance(value, torch.Tensor):
                raise ValueError(f"{item.dest_index.fqn} is a {type(value).__name__} where a tensor is described")
            for dimension, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
                value = value.narrow(dimension, start, length)
            target = planner.resolve_tensor(item).detach()
            if target.shape != value.shape:
                raise ValueError(f"{item.dest_index.fqn} is {tuple(value.shape)} there and {tuple(target.shape)} here")
            target.copy_(value)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


class PlainLoadPlanner(DefaultLoadPlanner):
    """Loads tensors, and of the entries that are none plain values alone: torch's own runs any pickle."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put a plain value in its place."""
        plain = read_part(value)
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
            reader, alone = _PlainReader(path), not dist.is_initialized()
            dcp.load(state, storage_reader=reader, planner=PlainLoadPlanner(), no_dist=alone)
        else:
            with Progress("reading the shards", bytes_in(path)) as bar:
                _load_state_dict(state, _PlainReader(path), planner=_WholePlanner(bar.advance), no_dist=True)
    except (Exception, dcp.CheckpointException) as error:
        raise unreadable(path, _cause(error)) from error


def _cause(error: BaseException) -> BaseException:
    """Return what went wrong on some rank, where torch has collected the errors of all."""
    failures = getattr(error, "failures", {})
    return next(iter(failures.values()))[0] if failures else error
