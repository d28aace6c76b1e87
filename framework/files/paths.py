"""Checks of paths that a user or a file gives, before anything is opened; and bounded reading of JSON files."""

import errno
import json
import os
import stat
import sys
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from orthotrain.errors import ConfigurationError

MAX_JSON_BYTES = 64 << 20
"""Largest JSON file that is parsed. Parsing takes up to 25 times the size of the file in memory."""

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
        what: Name of the option, for messages.

    Raises:
        ConfigurationError: The path is too long, has a character that no file name can have, or ``~`` names an unknown
            user.
    """
    text = str(name)
    if "\0" in text:
        raise ConfigurationError(f"{what} {text!r}: has a NUL character, which no path can have; remove it")
    try:
        os.fsencode(text)
        path = Path(text).expanduser()
        os.lstat(path)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ConfigurationError(f"{what} {text!r:.200}: is longer than a path can be") from error
    except UnicodeEncodeError as error:
        raise ConfigurationError(
            f"{what} {text!r}: has a lone surrogate at character {error.start}, which no path can have; remove it"
        ) from error
    except RuntimeError as error:
        raise ConfigurationError(f"{what} {text!r}: there is no such user; write the whole path") from error
    return path


def is_file_name(name: object) -> bool:
    """Tell whether a value is a plain file name, which on no system leads to another folder."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and "\0" not in name
        and {PurePosixPath(name).name, PureWindowsPath(name).name} == {name}
    )


def check_regular_file(path: str | Path, what: str) -> None:
    """Refuse a path that is not a regular file: opening a fifo or reading a device may never end. Links are followed.

    Args:
        path: The file.
        what: What the file should be, for messages, such as ``config``.

    Raises:
        ConfigurationError: There is nothing at the path, or a folder, a fifo, a socket or a device.
    """
    try:
        mode = os.stat(local_path(path, what)).st_mode
    except OSError as error:
        raise ConfigurationError(f"{what} {str(path)!r} cannot be read: {error.strerror or error}") from error
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "something else")
        raise ConfigurationError(f"{what} {str(path)!r} is {kind}, not a regular file: name a file")


def check_folder_files(folder: Path, what: str) -> None:
    """Refuse a folder that has a fifo, a socket or a device in it.

    This is for folders that a library reads: the library opens any file that has an expected name. Links are followed;
    a link whose target does not exist passes.

    Args:
        folder: The folder.
        what: What the folder should be, for messages.

    Raises:
        ConfigurationError: The folder cannot be read, or has such an entry; the message names the entry.
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
        what: What the file should be, for messages.

    Raises:
        ConfigurationError: The path is not a regular file, or the file is larger than 64 MiB or not JSON.
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
    """Return the JSON parser's message. For a long number Python's message gives advice to programmers: replace it."""
    if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return f"it has a number of more than {sys.get_int_max_str_digits():,} digits"
    return str(error)
