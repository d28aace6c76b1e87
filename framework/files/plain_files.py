"""Files of ``torch.save`` that hold a dictionary of plain values and tensors: read, described, and compared."""

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
from orthotrain.files.plain_values import read_description, read_values

_VERIFIED: set[tuple[Any, ...]] = set()
"""Files whose bytes this process has compared with their checksums, as they were then."""


def read_file(path: Path) -> dict[str, Any]:
    """Read a file; every byte is compared with its checksum, unless :func:`check_file` has just done so.

    Raises:
        ConfigurationError: If the file is cut or altered, or holds more than plain values and tensors.
    """
    with _opened(path) as (archive, state), Progress("reading the checkpoint", archive.size):
        values = read_values(read_description(archive), archive, verify=state not in _VERIFIED)
    return _dictionary(values, path)


def describe_file(path: Path) -> dict[str, Any]:
    """Return what a file holds without reading its tensors, for each of which there is a ``StoredTensor``.

    Raises:
        ConfigurationError: As :func:`read_file`, but for the values of tensors.
    """
    with _opened(path) as (archive, _):
        return _dictionary(read_description(archive), path)


def check_file(path: Path) -> None:
    """Compare every byte of a file with its checksum, in memory for one megabyte, and look at what it describes.

    Raises:
        ConfigurationError: As :func:`read_file`.
    """
    with _opened(path) as (archive, state):
        with Progress("checking the checkpoint", archive.size) as bar:
            archive.check_sums(bar.advance)
        _dictionary(read_description(archive), path)
    _VERIFIED.add(state)


def read_part(stream: IO[bytes]) -> Any:
    """Return what the part of a file holds that ``torch.save`` wrote, a plain value or a tensor.

    Raises:
        ValueError: If it is cut or altered, or holds something else.
    """
    archive = Archive(stream)
    return read_values(read_description(archive), archive)


def check_readable(stream: IO[bytes], path: str | Path) -> None:
    """Make sure that what has just been written can be read again, before it takes the place of an older file.

    Args:
        stream: The file that ``torch.save`` has written, open for reading too.
        path: Its name, for the message.

    Raises:
        ConfigurationError: Naming what a reader would refuse.
    """
    try:
        read_description(Archive(stream))
    except ValueError as error:
        raise ConfigurationError(
            f"checkpoint {str(path)!r} could not be read again ({error}): take that out of what the run saves"
        ) from error
    stream.seek(0, os.SEEK_END)


def crc32_of(path: Path, advance: Callable[[float], None] = lambda more: None) -> int:
    """Return the checksum of a file, read a few megabytes at a time (about a second per GB)."""
    crc = 0
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            crc = zlib.crc32(block, crc)
            advance(len(block))
    return crc


def unreadable(path: str | Path, error: BaseException) -> ConfigurationError:
    """Return the error of a checkpoint that cannot be read, in one line without anybody's advice."""
    lines = str(error).strip().splitlines() or ["it is too large for the memory here"]
    reason = "it is too large for the memory here" if isinstance(error, MemoryError) else visible(lines[0])
    return ConfigurationError(f"checkpoint {str(path)!r} cannot be read: {reason}; take an earlier one")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Archive, tuple[Any, ...]]]:
    try:
        with io.BufferedReader(io.FileIO(path)) as stream:
            found = os.fstat(stream.fileno())
            yield Archive(stream), (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    except ConfigurationError:
        raise
    except Exception as error:  # a damaged archive raises whatever its bytes happen to ask for
        raise unreadable(path, error) from error


def _dictionary(values: Any, path: Path) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise unreadable(path, ValueError(f"it holds a {type(values).__name__} and not a dictionary"))
    return values
