"""Journals of unfinished files and folders: one for each process and folder, locked while its process lives.

A journal notes a name before anything of that name is made. Its process holds a POSIX record lock on the journal: the
lock ends with the process however it dies, and a forked data worker does not inherit it. Who gets the lock of a journal
therefore knows that its process is dead. Where the file system has no locks, nobody knows that, and nothing is removed.

One thread at a time may call the functions of this module: closing a journal ends every lock of its process on it.
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
NAME = re.compile(r"\.(?P<target>.+)\.[0-9a-f]{16}(?P<suffix>\.partial|\.old)", re.DOTALL)
"""The names that a journal may note."""

JOURNAL = ".orthotrain-unfinished"
"""The first part of the name of a journal; a dot and 16 hexadecimal digits follow."""

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
        """Tell whether the journal is still in its folder and can note one more name."""
        return self.size + len(_record(name)) <= _MOST_BYTES and _is_at(self.descriptor, self.path)

    def add(self, name: str) -> None:
        self.names.append(name)
        rest = _record(name)
        while rest:
            written = os.write(self.descriptor, rest)
            self.size += written
            rest = rest[written:]
        os.fsync(self.descriptor)

    def unfinished(self) -> list[str]:
        """Forget the names that nothing has any longer and return the others."""
        folder = os.path.dirname(self.path)
        self.names = [name for name in self.names if os.path.lexists(os.path.join(folder, name))]
        return self.names

    def remove(self) -> None:
        """Remove the journal; a journal that cannot be removed is left to the next run."""
        with suppress(OSError):
            os.unlink(self.path)
        os.close(self.descriptor)


_own: dict[tuple[int, str], _Journal] = {}
"""The journals of this process by its number and the folder; a forked child finds none of its parent's."""


def note(folder: Path, name: str) -> None:
    """Note in the journal of this process that something of a name is about to be made in a folder."""
    key = (os.getpid(), os.path.realpath(folder))
    journal = _own.get(key)
    if journal is None or not journal.has_room(name):
        new = _make(key[1])
        try:
            for other in [] if journal is None else journal.unfinished():
                new.add(other)
        except BaseException:
            new.remove()
            raise
        _own[key] = new
        if journal is not None:
            journal.remove()
    _own[key].add(name)


def settle(folder: Path) -> None:
    """Remove the journal of this process in a folder if nothing that it notes is there any more."""
    key = (os.getpid(), os.path.realpath(folder))
    if key in _own and not _own[key].unfinished():
        _own.pop(key).remove()


def of_the_dead(folder: Path) -> Iterator[list[str]]:
    """Yield what each journal of a dead process notes; the journal is removed if nothing of it is left afterwards.

    Journals of living processes, links, folders, large files and files that cannot be opened or locked are passed over.
    """
    try:
        found = sorted(name for name in os.listdir(folder) if _FILE.fullmatch(name))
    except OSError:  # no folder, or one that this user cannot list
        return
    for name in found:
        path = folder / name
        if (descriptor := _take(path)) is None:
            continue
        try:
            names = [os.fsdecode(noted) for noted in os.pread(descriptor, _MOST_BYTES, 0).split(b"\0")]
            names = [noted for noted in names if "/" not in noted and NAME.fullmatch(noted)]
            yield names
            if not any(_is_left(folder / noted) for noted in names):
                with suppress(OSError):
                    path.unlink()
        finally:
            os.close(descriptor)


def _make(folder: str) -> _Journal:
    flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_APPEND | _NO_LINK
    for _ in range(_MOST_TRIES):
        path = os.path.join(folder, f"{JOURNAL}.{secrets.token_hex(8)}")
        journal = _Journal(path, os.open(path, flags, 0o666))
        # between the two calls another process may have taken the journal for that of a dead process
        if _lock(journal.descriptor) is not False and _is_at(journal.descriptor, path):
            return journal
        journal.remove()
    raise OSError(errno.EAGAIN, f"the list of unfinished files cannot be locked in {_MOST_TRIES} tries", folder)


def _take(path: Path) -> int | None:
    """Open and lock the journal of a dead process; None for everything else."""
    own = [os.fstat(journal.descriptor) for (process, _), journal in _own.items() if process == os.getpid()]
    try:
        found = os.lstat(path)
        # a second name may be one of a file that this process has locked: opening and closing it would end the lock
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
    """Lock a file without waiting; False if another process holds it, None if there are no locks."""
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


def _is_left(path: Path) -> bool:
    """Tell whether something of a noted name is there; a link is somebody else's."""
    return os.path.lexists(path) and not path.is_symlink()


def _record(name: str) -> bytes:
    """A name between two NULs: the rest of a record that a full disk has cut does not spoil the next one."""
    return b"\0" + os.fsencode(name) + b"\0"
