"""Files and folders that are written under a temporary name and renamed once they are complete.

A temporary name has a random part. The journal of its folder lists the name before anything of that name is created.
:func:`remove_leftovers` deletes what killed processes have left under temporary names. It touches no name that is
missing from the journals, and no name that a living process has listed.
"""

import os
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from orthotrain.console.failures import naming
from orthotrain.errors import ConfigurationError
from orthotrain.files.journal import (
    OLD_SUFFIX,
    PARTIAL_SUFFIX,
    TEMPORARY_NAME,
    add_to_journal,
    names_of_dead_processes,
    remove_finished_journal,
)

_MOST_NAME_BYTES = 255
_LOCK = threading.Lock()


def is_unfinished(path: Path) -> bool:
    """Tell whether a path has a temporary name of this module."""
    return TEMPORARY_NAME.fullmatch(path.name) is not None


def check_name_length(target: Path) -> None:
    """Refuse a file name whose temporary name would be too long for a file system.

    Raises:
        ConfigurationError: The name is too long; the message states both lengths.
    """
    length, most = len(os.fsencode(target.name)), _MOST_NAME_BYTES - len(_draw_name(Path(), PARTIAL_SUFFIX))
    if length > most:
        raise ConfigurationError(
            f"{str(target)!r}: the name is {length} bytes long, and {most} is the most (its temporary name is "
            f"{_MOST_NAME_BYTES - most} bytes longer): give a shorter name"
        )


def open_temporary_file(target: Path) -> IO[bytes]:
    """Create and open an empty file under a temporary name in the folder of ``target``.

    An existing file is never opened, and a link is never followed.
    """
    with _listed_name(target, PARTIAL_SUFFIX) as path:
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        return open(path, "w+b", opener=lambda name, _: os.open(name, flags, 0o666))


def make_temporary_folder(target: Path) -> Path:
    """Create an empty folder under a temporary name in the folder of ``target``."""
    with _listed_name(target, PARTIAL_SUFFIX) as path:
        path.mkdir()
        return path


def rename_to_temporary(path: Path, suffix: str = PARTIAL_SUFFIX) -> Path:
    """Rename a file, a folder or a link to a temporary name, and return the new path.

    With ``OLD_SUFFIX``, :func:`remove_leftovers` later restores the old name, unless that name is in use again.
    """
    with _listed_name(path, suffix) as new:
        os.replace(path, new)
        return new


def discard(path: Path) -> None:
    """Delete a temporary file or folder, and the journal of its folder if no other name in the journal is in use."""
    _delete(path)
    with _LOCK:
        remove_finished_journal(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a small text file in UTF-8, as :func:`write_atomically` does."""
    with naming(path):
        write_atomically(path, lambda file: file.write(text.encode("utf-8")))


def open_to_append(path: Path) -> IO[str]:
    """Open a text file to append to it.

    Raises:
        OSError: The file cannot be opened, or is a link.
    """
    flags = getattr(os, "O_NOFOLLOW", 0)
    return open(path, "a", encoding="utf-8", newline="", opener=lambda name, mode: os.open(name, mode | flags, 0o666))


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file that appears under its name only when it is complete and on the disk.

    Args:
        path: Path of the file. Missing folders are created.
        write: Writes the contents into the open file that it is given.
    """
    check_name_length(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open_temporary_file(path)
    try:
        with file:
            write(file)
        publish(Path(file.name), path)
    except BaseException:
        discard(Path(file.name))
        raise


def publish(temporary: Path, target: Path) -> None:
    """Flush a complete temporary file or folder to the disk, and rename it to ``target``.

    An older file, link or folder at ``target`` is replaced; a link is not followed. A folder cannot be replaced in one
    step: it is renamed first and deleted last. If the process dies between the two renames,
    :func:`remove_leftovers` restores the older one.
    """
    for path in [*(temporary.iterdir() if temporary.is_dir() else ()), temporary]:
        sync(path)
    if temporary.is_dir() and target.is_symlink():
        target.unlink()
    # os.replace replaces a file or a link by a file, but neither a folder nor anything by a folder
    replaceable = target.is_symlink() or not (temporary.is_dir() or target.is_dir())
    old = rename_to_temporary(target, OLD_SUFFIX) if target.exists() and not replaceable else None
    os.replace(temporary, target)
    sync(target.parent)
    discard(temporary if old is None else old)


def remove_folder(folder: Path) -> None:
    """Remove a folder, after renaming it, so that a half-deleted folder is never listed under its name."""
    discard(rename_to_temporary(folder))


def remove_leftovers(folder: Path) -> None:
    """Delete what killed processes have left under temporary names in a folder.

    Files of living processes stay, because a living process holds the lock of its journal. On a file system without
    locks nothing is deleted.
    """
    with _LOCK:
        for names in names_of_dead_processes(folder):
            for name in names:
                _restore_name(folder / name)
            for name in names:
                _delete(folder / name)


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on the disk."""
    windows = os.name == "nt"  # where a folder cannot be opened, and a file only be flushed if it is open for writing
    if path.is_dir() and windows:
        return
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _listed_name(target: Path, suffix: str) -> Iterator[Path]:
    """Yield a new temporary path in the folder of ``target``, already listed in the journal of the folder."""
    check_name_length(target)
    path = target.with_name(_draw_name(target, suffix))
    with _LOCK:
        try:
            add_to_journal(path.parent, path.name)
            yield path
        except BaseException:
            remove_finished_journal(path.parent)
            raise


def _draw_name(target: Path, suffix: str) -> str:
    return f".{target.name}.{secrets.token_hex(8)}{suffix}"


def _restore_name(old: Path) -> None:
    """Give a folder that :func:`publish` has renamed its own name back, unless that name is in use."""
    found = TEMPORARY_NAME.fullmatch(old.name)
    if found is None or found["suffix"] != OLD_SUFFIX or old.is_symlink():
        return
    target = old.with_name(found["target"])
    with suppress(OSError):
        if not os.path.lexists(target):
            os.replace(old, target)


def _delete(path: Path) -> None:
    """Delete a file or a folder. A link stays: another program has put it there."""
    if path.is_symlink():
        return
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)
