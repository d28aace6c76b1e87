"""Files and folders under another name while they are written or removed, and what a killed process leaves of them.

Every such name has a random part and is noted in a journal of its folder before anything of that name is made. What is
not noted there, or noted by a process that lives, is not touched, whatever its name.
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
from orthotrain.files.journal import NAME, OLD_SUFFIX, PARTIAL_SUFFIX, note, of_the_dead, settle

_MOST_NAME_BYTES = 255
_LOCK = threading.Lock()


def is_unfinished(path: Path) -> bool:
    """Tell whether a name is one that this package gives to what is unfinished."""
    return NAME.fullmatch(path.name) is not None


def check_name(target: Path) -> None:
    """Refuse a name that is too long for a file system once it has the parts of an unfinished one.

    Raises:
        ConfigurationError: Naming the length.
    """
    length, most = len(os.fsencode(target.name)), _MOST_NAME_BYTES - len(_unused(Path(), PARTIAL_SUFFIX))
    if length > most:
        raise ConfigurationError(
            f"{str(target)!r}: the name is {length} bytes long, and {most} is the most (until all of it is written, it "
            f"has a name that is {_MOST_NAME_BYTES - most} bytes longer): give a shorter name"
        )


def file_beside(target: Path) -> IO[bytes]:
    """Make an empty file of an unused name beside the place that it is for, and open it.

    No link of that name is followed, and what has the name is never opened.
    """
    with _noted(target, PARTIAL_SUFFIX) as path:
        flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        return open(path, "w+b", opener=lambda name, _: os.open(name, flags, 0o666))


def folder_beside(target: Path) -> Path:
    """Make an empty folder of an unused name beside the place that it is for."""
    with _noted(target, PARTIAL_SUFFIX) as path:
        path.mkdir()
        return path


def set_aside(path: Path, suffix: str = PARTIAL_SUFFIX) -> Path:
    """Take the name of a file, a folder or a link away from it and return the new name.

    With ``OLD_SUFFIX``, :func:`remove_leftovers` gives the name back if nothing else has it by then.
    """
    with _noted(path, suffix) as new:
        os.replace(path, new)
        return new


def discard(path: Path) -> None:
    """Remove what has one of the names of this module, and the journal with it if nothing else is unfinished."""
    _remove(path)
    with _LOCK:
        settle(path.parent)


def finish(path: Path, target: Path) -> None:
    """Give a file that is on the disk its name, in the place of what has that name; a link is not followed."""
    os.replace(path, target)
    sync(target.parent)
    with _LOCK:
        settle(target.parent)


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
    check_name(path)
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
    """Remove what killed processes were writing, or had not yet removed; what a living one writes stays.

    A process that lives holds the lock of its journal. On a file system without locks nothing is removed.
    """
    with _LOCK:
        for names in of_the_dead(folder):
            for name in names:
                _give_back(folder / name)
            for name in names:
                _remove(folder / name)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _noted(target: Path, suffix: str) -> Iterator[Path]:
    """Yield an unused name beside a place, noted in the journal of its folder; nothing is made if the block fails."""
    check_name(target)
    path = target.with_name(_unused(target, suffix))
    with _LOCK:
        try:
            note(path.parent, path.name)
            yield path
        except BaseException:
            settle(path.parent)
            raise


def _unused(target: Path, suffix: str) -> str:
    return f".{target.name}.{secrets.token_hex(8)}{suffix}"


def _give_back(old: Path) -> None:
    """Give what was between two names its own again, if nothing else has it; a link is somebody else's."""
    found = NAME.fullmatch(old.name)
    if found is None or found["suffix"] != OLD_SUFFIX or old.is_symlink():
        return
    target = old.with_name(found["target"])
    with suppress(OSError):
        if not os.path.lexists(target):
            os.replace(old, target)


def _remove(path: Path) -> None:
    """Remove a file or a folder; a link in its place is somebody else's."""
    if path.is_symlink():
        return
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)
