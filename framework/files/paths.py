"""Paths that a user or a file gives: what is checked before anything is opened."""

import errno
import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

from orthotrain.errors import ConfigurationError

MAX_JSON_BYTES = 64 << 20
"""Largest JSON file that is parsed as a whole: parsing takes up to 25 times its size."""

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a fifo"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def local_path(name: str | Path, what: str) -> Path:
    """Return a path with ``~`` expanded.

    Args:
        name: The path.
        what: The name of the option, for messages.

    Raises:
        ConfigurationError: The path is too long, holds a character that no file name can hold, or ``~`` names no known
            user.
    """
    text = str(name)
    if "\0" in text:
        raise ConfigurationError(f"{what} {text!r}: holds a NUL character, which no path can hold; remove it")
    try:
        os.fsencode(text)
        path = Path(text).expanduser()
        os.lstat(path)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ConfigurationError(f"{what} {text!r:.200}: is longer than a path can be") from error
    except UnicodeEncodeError as error:
        raise ConfigurationError(
            f"{what} {text!r}: holds a lone surrogate at character {error.start}, which no path can hold; remove it"
        ) from error
    except RuntimeError as error:
        raise ConfigurationError(f"{what} {text!r}: there is no such user; write the whole path") from error
    return path


def check_regular_file(path: str | Path, what: str) -> None:
    """Refuse what is no regular file, links followed: opening a fifo or reading a device may never end.

    Args:
        path: The file.
        what: What the file is to be, for messages, such as ``config``.

    Raises:
        ConfigurationError: The path names nothing, a folder, a fifo, a socket or a device.
    """
    try:
        mode = os.stat(local_path(path, what)).st_mode
    except OSError as error:
        raise ConfigurationError(f"{what} {str(path)!r} cannot be read: {error.strerror or error}") from error
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "something else")
        raise ConfigurationError(f"{what} {str(path)!r} is no regular file but {kind}: name a file")


def check_folder_files(folder: Path, what: str) -> None:
    """Refuse a folder that holds a fifo, a socket or a device, links followed, beside its files and folders.

    For folders that a library reads, which opens what it finds by name. A link that leads nowhere passes.

    Args:
        folder: The folder.
        what: What the folder is to be, for messages.

    Raises:
        ConfigurationError: Naming the entry.
    """
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise ConfigurationError(f"{what} {str(folder)!r} cannot be read: {error.strerror or error}") from error
    for entry in entries:
        if os.path.exists(entry.path) and not os.path.isdir(entry.path):
            check_regular_file(entry.path, f"{what}: file")


def read_json(path: Path, what: str) -> Any:
    """Parse a JSON file of bounded size.

    Args:
        path: The file.
        what: What the file is to be, for messages.

    Raises:
        ConfigurationError: No regular file, larger than 64 MiB, or not JSON.
    """
    check_regular_file(path, what)
    try:
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            raise ConfigurationError(
                f"{what} {str(path)!r} has {size:,} bytes; such a file has at most {MAX_JSON_BYTES:,}"
            )
        return json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigurationError(f"{what} {str(path)!r} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(f"{what} {str(path)!r} is not valid JSON ({json_failure(error):.200})") from error


def json_failure(error: Exception) -> str:
    """Return what the JSON parser found wrong; its own words for a long number give advice to programmers."""
    if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return f"it has a number of more than {sys.get_int_max_str_digits():,} digits"
    return str(error)
