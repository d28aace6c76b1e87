"""Distributed checkpoints: folders with the shards of all ranks, written atomically and read without running code."""

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
from orthotrain.checkpoints.stored_paths import SHARDED_FILES
from orthotrain.checkpoints.writing import plain_copy, reason_of, unwritable
from orthotrain.console.progress import Progress, bytes_in
from orthotrain.errors import ConfigurationError
from orthotrain.files.atomic_writes import discard, make_temporary_folder, publish, remove_leftovers
from orthotrain.files.paths import read_json
from orthotrain.files.torch_files import crc32_of, file_state, read_part, unreadable

_, REST, SUMS = SHARDED_FILES
"""Names of the file with everything that is not a sharded tensor, and of the file with the checksum of every file."""

_VERIFIED: set[tuple[Any, ...]] = set()
"""States of the files of each folder that this process has compared with its checksums."""


def save_shards(state: dict[str, Any], rest: dict[str, Any], path: Path, on_any_rank: Callable[[bool], bool]) -> None:
    """Write a distributed checkpoint to a temporary folder, and rename the folder when all of it is on the disk.

    Every rank must call this function, and writes its own shards. The checksums of all files go into a JSON file.

    Args:
        state: Nested dictionaries of tensors, sharded or the same on all ranks.
        rest: Plain values and tensors, the same on all ranks. Rank 0 writes them.
        path: The folder. An older folder of that name is replaced.
        on_any_rank: Takes whether this rank has failed, and tells whether any rank has.

    Raises:
        ConfigurationError: On every rank, if any rank cannot write. Older checkpoints are intact.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    partial = path
    failure: BaseException | None = None
    try:
        if first:
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(path.parent)
            partial = make_temporary_folder(path)
    except (OSError, ConfigurationError) as error:
        failure = error
    if not on_any_rank(failure is not None):
        names = [partial.name]
        if dist.is_initialized():
            dist.broadcast_object_list(names, src=0)  # every rank writes into the folder that rank 0 has made
        partial = path.with_name(names[0])
        try:
            dcp.save(state, checkpoint_id=partial)
            _write_sums(partial, rest, first)
        except (Exception, dcp.CheckpointException) as error:  # CheckpointException is a BaseException
            failure = error
    if on_any_rank(failure is not None):
        if first and partial != path:
            discard(partial)
        reason = "another rank failed" if failure is None else reason_of(_cause(failure))
        raise unwritable(path, reason) from failure
    if first:
        publish(partial, path)
    on_any_rank(False)  # a barrier: no rank continues before the folder has its name


def _write_sums(folder: Path, rest: dict[str, Any], first: bool) -> None:
    """Compute the checksums of the files of this rank. Rank 0 collects all of them and writes the JSON file."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    own = list(folder.glob(f"__{rank}_*"))
    if first:
        torch.save(plain_copy(rest), folder / REST)
        own += [folder / DESCRIPTION, folder / REST]
    sums = {file.name: [file.stat().st_size, crc32_of(file)] for file in own}
    everyone: list[Any] = [sums] * ranks
    if ranks > 1:
        dist.all_gather_object(everyone, sums)
    if first:
        index = {name: entry for part in everyone for name, entry in sorted(part.items())}
        (folder / SUMS).write_text(json.dumps(index, indent=1), encoding="utf-8")


def check_shards(path: Path) -> Metadata:
    """Compare every file of a distributed checkpoint with its checksum, and return the description of its shards.

    Files that this process has already compared are read again only if they have changed.

    Raises:
        ConfigurationError: A file is missing, changed or hostile; the message names it.
    """
    for name in (DESCRIPTION, REST, SUMS):
        if not (path / name).is_file():
            raise ConfigurationError(f"checkpoint {str(path)!r} is a folder without {name}: it is incomplete")
    index = read_json(path / SUMS, "list of checksums")
    try:
        sums = {own_name(name): (int(size), int(crc)) for name, (size, crc) in index.items()}
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise unreadable(path / SUMS, error) from error
    expected: dict[str, tuple[int, int] | None] = {**dict.fromkeys((DESCRIPTION, REST)), **sums}
    state = (str(path), *(file_state(path / name) for name in (SUMS, *expected) if (path / name).is_file()))
    if state not in _VERIFIED:
        with Progress("checking the shards", bytes_in(path)) as bar:
            for name, sum_ in expected.items():
                file = path / name
                size = file.stat().st_size if file.is_file() else -1
                if sum_ is None or size != sum_[0] or crc32_of(file, bar.advance) != sum_[1]:
                    raise unreadable(file, ValueError("it is missing or does not match its checksum"))
        _VERIFIED.add(state)
    metadata = read_shard_description(path)
    for info in metadata.storage_data.values():
        if info.relative_path not in sums:
            foreign = ValueError(f"it names {info.relative_path!r}, which is not a file of its folder")
            raise unreadable(path / DESCRIPTION, foreign)
    return metadata


class _PlainReader(dcp.FileSystemReader):
    """Reads plain values and tensors of a distributed checkpoint. The reader of torch would unpickle anything."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the checked description of the shards."""
        metadata = read_shard_description(Path(self.path))
        assert metadata.storage_meta is not None
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the items of a plan."""
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
                raise ValueError(f"{item.dest_index.fqn} is a {type(value).__name__}, not a tensor")
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
    """Loads tensors and plain values. The planner of torch would unpickle anything."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Load a plain value."""
        plain = read_part(value)
        name = read_item.dest_index.fqn
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[name], plain)
        else:
            self.state_dict[name] = plain


class _WholePlanner(PlainLoadPlanner, _EmptyStateDictLoadPlanner):
    """Loads everything in a folder into an empty dictionary, and reports the number of bytes."""

    def __init__(self, advance: Callable[[float], None]) -> None:
        super().__init__()
        self.advance = advance

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Report the bytes of a tensor that has been read."""
        super().commit_tensor(read_item, tensor)
        self.advance(tensor.nbytes)


def load_shards(state: dict[str, Any], path: Path) -> None:
    """Fill a state dict in place from the shards of a folder. Every rank reads only what it needs.

    Args:
        state: Nested dictionaries whose tensors are filled. An empty dictionary gets everything in the folder; this
            works in a process without other ranks.
        path: A folder that :func:`check_shards` has accepted.

    Raises:
        ConfigurationError: Something is missing, or an entry is neither a tensor nor a plain value.
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
    """Return the error of one rank, if torch has collected the errors of all ranks in ``error``."""
    failures = getattr(error, "failures", {})
    return next(iter(failures.values()))[0] if failures else error
