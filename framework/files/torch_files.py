"""Reads and checks files of ``torch.save`` that hold a dictionary of plain values and tensors."""

import io
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from orthotrain.console.progress import Progress
from orthotrain.errors import ConfigurationError, visible
from orthotrain.files.archive import Archive
from orthotrain.files.archive_contents import describe_contents, read_tensors

_VERIFIED: set[tuple[Any, ...]] = set()
"""State (see :func:`file_state`) of each file whose bytes this process has compared with their checksums."""


def read_file(path: Path) -> dict[str, Any]:
    """Read a file. Every byte is compared with its checksum, unless :func:`check_file` has done so already.

    Raises:
        ConfigurationError: The file is truncated or changed, or holds more than plain values and tensors.
    """
    with _opened(path) as (archive, state), Progress("reading the checkpoint", archive.size):
        values = read_tensors(describe_contents(archive), archive, verify=state not in _VERIFIED)
    return _dictionary(values, path)


def describe_file(path: Path) -> dict[str, Any]:
    """Return the contents of a file with a ``StoredTensor`` in the place of each tensor. No tensor is read.

    Raises:
        ConfigurationError: As :func:`read_file`, except that the values of tensors are not checked.
    """
    with _opened(path) as (archive, _):
        return _dictionary(describe_contents(archive), path)


def check_file(path: Path) -> None:
    """Compare every byte of a file with its checksum, and check its structure, without loading its tensors.

    Raises:
        ConfigurationError: As :func:`read_file`.
    """
    with _opened(path) as (archive, state):
        with Progress("checking the checkpoint", archive.size) as bar:
            archive.check_sums(bar.advance)
        _dictionary(describe_contents(archive), path)
    _VERIFIED.add(state)


def read_part(stream: IO[bytes]) -> Any:
    """Return the plain value or the tensor in a stream that ``torch.save`` wrote.

    Raises:
        ValueError: The stream is truncated or changed, or holds something else.
    """
    archive = Archive(stream)
    return read_tensors(describe_contents(archive), archive)


def check_readable(stream: IO[bytes], path: str | Path) -> None:
    """Check that a file that has just been written can be read again, before it replaces an older file.

    Args:
        stream: The file that ``torch.save`` has written, open for reading and writing.
        path: Its future path, for the message.

    Raises:
        ConfigurationError: The reader would refuse something in the file; the message names it.
    """
    try:
        describe_contents(Archive(stream))
    except ValueError as error:
        raise ConfigurationError(
            f"checkpoint {str(path)!r} could not be read again ({error}): remove this value from what the run saves"
        ) from error
    stream.seek(0, os.SEEK_END)


def crc32_of(path: Path, advance: Callable[[float], None] = lambda more: None) -> int:
    """Return the CRC-32 of a file (about a second per GB), read a few megabytes at a time."""
    crc = 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            crc = zlib.crc32(block, crc)
            advance(len(block))
    return crc


def unreadable(path: str | Path, error: BaseException) -> ConfigurationError:
    """Return the error for a checkpoint that cannot be read. Of a library's message only the first line is kept."""
    lines = str(error).strip().splitlines() or ["it is too large for the memory here"]
    reason = "it is too large for the memory here" if isinstance(error, MemoryError) else visible(lines[0])
    return ConfigurationError(f"checkpoint {str(path)!r} cannot be read: {reason}; take an earlier one")


def file_state(file: int | Path) -> tuple[int, ...]:
    """Return numbers that identify the state of a file. At least one changes when the file is written again.

    Args:
        file: A path or an open file descriptor.
    """
    found = os.stat(file)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Archive, tuple[Any, ...]]]:
    try:
        with io.BufferedReader(io.FileIO(path)) as stream:
            yield Archive(stream), file_state(stream.fileno())
    except ConfigurationError:
        raise
    except Exception as error:  # a damaged archive can raise any exception
        raise unreadable(path, error) from error


def _dictionary(values: Any, path: Path) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise unreadable(path, ValueError(f"it holds a {type(values).__name__}, not a dictionary"))
    return values
