"""Files and folders under another name while they are written or removed, and what a killed process leaves of them.

Every such name has a random part and is noted in a journal of its folder before anything of that name is made. What is
not noted there belongs to somebody else: it is not touched, whatever its name.
"""

import os
import re
import secrets
import shutil
import stat
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from orthotrain.errors import ConfigurationError
from orthotrain.failures import naming

PARTIAL_SUFFIX, OLD_SUFFIX = ".partial", ".old"
JOURNAL = ".orthotrain-unfinished"
"""The file, in the folder of each, that notes the names of what is unfinished; there while something is."""

_NAME = re.compile(r"\.(?P<target>.+)\.[0-9a-f]{16}(?P<suffix>\.partial|\.old)", re.DOTALL)
_MOST_BYTES = 1 << 20
_LOCK = threading.Lock()


def is_unfinished(path: Path) -> bool:
    """Tell whether a name is one that this package gives to what is unfinished."""
    return _NAME.fullmatch(path.name) is not None


def file_beside(target: Path) -> IO[bytes]:
    """Make an empty file of an unused name beside the place that it is for, and open it.

    No link of that name is followed, and what has the name is never opened.
    """
    with _LOCK:
        path = _noted(target, PARTIAL_SUFFIX)
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        return open(path, "w+b", opener=lambda name, _: os.open(name, flags, 0o666))


def folder_beside(target: Path) -> Path:
    """Make an empty folder of an unused name beside the place that it is for."""
    with _LOCK:
        path = _noted(target, PARTIAL_SUFFIX)
        path.mkdir()
        return path


def set_aside(path: Path, suffix: str = PARTIAL_SUFFIX) -> Path:
    """Take the name of a file, a folder or a link away from it and return the new name.

    With ``OLD_SUFFIX``, :func:`remove_leftovers` gives the name back if nothing else has it by then.
    """
    with _LOCK:
        new = _noted(path, suffix)
        os.replace(path, new)
        return new


def discard(path: Path) -> None:
    """Remove what has one of the names of this module, and the journal with it if nothing else is unfinished."""
    _remove(path)
    with _LOCK, suppress(OSError):
        _settle(path.parent)


def finish(path: Path, target: Path) -> None:
    """Give a file that is on the disk its name, in the place of what has that name; a link is not followed."""
    os.replace(path, target)
    sync(target.parent)
    with _LOCK:
        _settle(target.parent)


def write_text(path: Path, text: str) -> None:
    """Write a small file as :func:`write_atomically` does, in UTF-8."""
    with naming(path):
        write_atomically(path, lambda file: file.write(text.encode("utf-8")))


def open_to_append(path: Path) -> IO[str]:
    """Open a text file to add to it; a link in its place is not followed.

    Raises:
        OSError: If it cannot be opened, or is a link.
    """
    flags = getattr(os, "O_NOFOLLOW", 0)
    return open(path, "a", encoding="utf-8", newline="", opener=lambda name, mode: os.open(name, mode | flags, 0o666))


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill a file that takes its name only when it is whole and on the disk.

    Args:
        path: The final place; folders are made.
        write: Gets the open file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = file_beside(path)
    try:
        with file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if path.is_dir() and not path.is_symlink():  # a distributed checkpoint, which a rename cannot replace
            publish(Path(file.name), path)
        else:
            finish(Path(file.name), path)
    except BaseException:
        discard(Path(file.name))
        raise


def publish(partial: Path, target: Path) -> None:
    """Give a finished folder, or file, its name once all of it is on the disk; an older one of that name goes.

    A run that dies between the two renames leaves the older one under another name: :func:`remove_leftovers` gives it
    its own back.
    """
    for path in [*(partial.iterdir() if partial.is_dir() else ()), partial]:
        sync(path)
    if target.is_symlink():  # what it leads to is not this program's to remove
        target.unlink()
    old = set_aside(target, OLD_SUFFIX) if target.exists() else None
    os.replace(partial, target)
    sync(target.parent)
    discard(partial if old is None else old)


def remove_folder(folder: Path) -> None:
    """Remove a folder, renamed before its first file is deleted, so that a half-deleted one is never listed."""
    discard(set_aside(folder))


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed run was writing, or had not yet removed; only one run may write to a folder.

    Raises:
        ConfigurationError: If the journal of the folder is none.
    """
    names = _journal(folder)
    for name in names:
        old, found = folder / name, _NAME.fullmatch(name)
        assert found is not None
        with suppress(OSError):  # another rank has been faster
            free = not old.is_symlink() and not os.path.lexists(folder / found["target"])
            if found["suffix"] == OLD_SUFFIX and free:
                os.replace(old, folder / found["target"])
    for name in names:
        _remove(folder / name)
    if names:
        with _LOCK, suppress(OSError):
            _settle(folder)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _noted(target: Path, suffix: str) -> Path:
    """Return an unused name beside a place, noted in the journal of its folder."""
    name = f".{target.name}.{secrets.token_hex(8)}{suffix}"
    flags = os.O_CREAT | os.O_APPEND | os.O_WRONLY
    _check_journal(target.parent)
    descriptor = os.open(target.parent / JOURNAL, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        os.write(descriptor, os.fsencode(name) + b"\0")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return target.with_name(name)


def _journal(folder: Path) -> list[str]:
    """Return the names that the journal of a folder notes."""
    if not _check_journal(folder):
        return []
    with suppress(FileNotFoundError):  # another rank has been faster
        with open(folder / JOURNAL, "rb") as file:
            names = [os.fsdecode(name) for name in file.read(_MOST_BYTES).split(b"\0")]
        return [name for name in names if "/" not in name and _NAME.fullmatch(name)]
    return []


def _check_journal(folder: Path) -> bool:
    """Tell whether a folder has a journal.

    Raises:
        ConfigurationError: If something else has its name.
    """
    path = folder / JOURNAL
    try:
        found = path.lstat()
    except OSError:
        return False
    if not stat.S_ISREG(found.st_mode) or found.st_size > _MOST_BYTES:
        raise ConfigurationError(f"{str(path)!r} is no list of unfinished files that this program wrote: remove it")
    return True


def _settle(folder: Path) -> None:
    """Remove the journal of a folder in which nothing is unfinished any more."""
    if not any(os.path.lexists(folder / name) for name in _journal(folder)):
        (folder / JOURNAL).unlink(missing_ok=True)


def _remove(path: Path) -> None:
    """Remove a file or a folder; a link in its place is somebody else's."""
    if path.is_symlink():
        return
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)
