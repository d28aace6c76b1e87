"""Journals: files that list the temporary names of unfinished files and folders.

Each process has one journal in each folder that it writes to. It adds a name to the journal before it creates anything
of that name, and holds a POSIX record lock on the journal. The lock ends with the process, however the process dies,
and a forked data worker does not inherit it. A process that gets the lock of a journal therefore knows that the owner
of the journal is dead. On a file system without locks this is never known, and nothing is removed.

Only one thread at a time may call these functions: closing a journal ends every lock of the process on it.
"""

import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

PARTIAL_SUFFIX, OLD_SUFFIX = ".partial", ".old"
TEMPORARY_NAME = re.compile(r"\.(?P<target>.+)\.[0-9a-f]{16}(?P<suffix>\.partial|\.old)", re.DOTALL)
"""The names that a journal may list."""

JOURNAL = ".orthotrain-unfinished"
"""First part of the name of a journal. A dot and 16 hexadecimal digits follow."""

_FILE = re.compile(re.escape(JOURNAL) + r"\.[0-9a-f]{16}")
_MOST_BYTES = 1 << 20
_MOST_TRIES = 100
_TAKEN = {errno.EACCES, errno.EAGAIN}
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)


class _Journal:
    """The journal of this process in one folder, open and locked."""

    def __init__(self, path: str, descriptor: int) -> None:
        self.path, self.descriptor = path, descriptor
        self.size = 0
        self.names: list[str] = []

    def has_room(self, name: str) -> bool:
        """Tell whether the journal is still in its folder and has room for one more name."""
        return self.size + len(_record(name)) <= _MOST_BYTES and _is_at(self.descriptor, self.path)

    def add(self, name: str) -> None:
        self.names.append(name)
        rest = _record(name)
        while rest:
            written = os.write(self.descriptor, rest)
            self.size += written
            rest = rest[written:]
        os.fsync(self.descriptor)

    def names_in_use(self) -> list[str]:
        """Forget the names that no file or folder has any longer, and return the others."""
        folder = os.path.dirname(self.path)
        self.names = [name for name in self.names if os.path.lexists(os.path.join(folder, name))]
        return self.names

    def remove(self) -> None:
        """Delete the journal. If that fails, the next run deletes it."""
        with suppress(OSError):
            os.unlink(self.path)
        os.close(self.descriptor)


_own: dict[tuple[int, str], _Journal] = {}
"""(process id, folder) -> journal. A forked child has another process id, and so does not use its parent's journals."""


def add_to_journal(folder: Path, name: str) -> None:
    """Add a temporary name to the journal of this process in a folder, before anything of that name is created."""
    key = (os.getpid(), os.path.realpath(folder))
    journal = _own.get(key)
    if journal is None or not journal.has_room(name):
        new = _make(key[1])
        try:
            for other in [] if journal is None else journal.names_in_use():
                new.add(other)
        except BaseException:
            new.remove()
            raise
        _own[key] = new
        if journal is not None:
            journal.remove()
    _own[key].add(name)


def remove_finished_journal(folder: Path) -> None:
    """Delete the journal of this process in a folder if none of its names is in use any more."""
    key = (os.getpid(), os.path.realpath(folder))
    if key in _own and not _own[key].names_in_use():
        _own.pop(key).remove()


def names_of_dead_processes(folder: Path) -> Iterator[list[str]]:
    """Yield the names in each journal of a dead process.

    After the caller has handled the names, the journal is deleted if none of them is in use. Journals of living
    processes, links, folders, large files, and files that cannot be opened or locked are skipped.
    """
    try:
        found = sorted(name for name in os.listdir(folder) if _FILE.fullmatch(name))
    except OSError:  # there is no such folder, or this user cannot list it
        return
    for name in found:
        path = folder / name
        if (descriptor := _open_dead(path)) is None:
            continue
        try:
            listed = [os.fsdecode(name) for name in os.pread(descriptor, _MOST_BYTES, 0).split(b"\0")]
            listed = [name for name in listed if "/" not in name and TEMPORARY_NAME.fullmatch(name)]
            yield listed
            # a link of a listed name is not ours
            if not any(os.path.lexists(folder / name) and not (folder / name).is_symlink() for name in listed):
                with suppress(OSError):
                    path.unlink()
        finally:
            os.close(descriptor)


def _make(folder: str) -> _Journal:
    flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_APPEND | _NO_LINK
    for _ in range(_MOST_TRIES):
        path = os.path.join(folder, f"{JOURNAL}.{secrets.token_hex(8)}")
        journal = _Journal(path, os.open(path, flags, 0o666))
        # between creating and locking the journal, another process may have deleted it as the journal of a dead process
        if _lock(journal.descriptor) is not False and _is_at(journal.descriptor, path):
            return journal
        journal.remove()
    raise OSError(errno.EAGAIN, f"the list of unfinished files could not be locked in {_MOST_TRIES} tries", folder)


def _open_dead(path: Path) -> int | None:
    """Open and lock the journal of a dead process; return None for every other file."""
    own = [os.fstat(journal.descriptor) for (process, _), journal in _own.items() if process == os.getpid()]
    try:
        found = os.lstat(path)
        # a hard link may lead to a journal that this process has locked: opening and closing it would end that lock
        regular = stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and found.st_size <= _MOST_BYTES
        if not regular or any(os.path.samestat(found, mine) for mine in own):
            return None
        descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK | _NO_LINK)
    except OSError:
        return None
    if _lock(descriptor) and _is_at(descriptor, path):
        return descriptor
    os.close(descriptor)
    return None


def _lock(descriptor: int) -> bool | None:
    """Lock a file without waiting. Return False if another process holds the lock, None if there are no locks."""
    try:
        import fcntl

        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows
        return None
    except OSError as error:
        return False if error.errno in _TAKEN else None
    return True


def _is_at(descriptor: int, path: str | Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except OSError:
        return False


def _record(name: str) -> bytes:
    """Return a name between two NULs, so that a record that a full disk has cut does not spoil the next record."""
    return b"\0" + os.fsencode(name) + b"\0"
