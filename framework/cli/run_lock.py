"""The lock on the folders of a run: a second run in one of them is refused, and the message names the first run."""

import contextlib
import errno
import fcntl
import json
import os
import re
import shlex
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from orthotrain.errors import ConfigurationError, visible

LOCK_NAME = ".orthotrain.run"
"""Name of the locked file in a folder. The file describes the run, which removes the file at its end."""

_TAKEN = {errno.EACCES, errno.EAGAIN}
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_REMOTE = re.compile(r"[\w+.-]{2,}:/")
_MOST_BYTES = 4096
_HELD: dict[Path, int] = {}
"""Folders that this process has locked -> descriptors of their lock files."""


@contextlib.contextmanager
def holding(folders: Iterable[Path]) -> Iterator[None]:
    """Lock some folders while the block runs.

    The locks are POSIX record locks. They end with this process, however it dies. Data loader workers, which outlive a
    killed run by seconds, do not inherit them. A folder that this process has locked before is skipped.

    Args:
        folders: The folders; a missing one is created. Folders with a protocol (``s3://``) are not locked.

    Raises:
        ConfigurationError: If another process has locked a folder; the message names the process.
        OSError: If a folder is not writable.
    """
    locked: list[Path] = []
    try:
        for folder in dict.fromkeys(Path(folder).resolve() for folder in folders if not _REMOTE.match(str(folder))):
            if folder not in _HELD and _lock_folder(folder):
                locked.append(folder)
        yield
    finally:
        for folder in locked:
            _unlock(folder)


def _lock_folder(folder: Path) -> bool:
    """Lock a folder; return False if the file system has no locks."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_NAME
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            if not _lock(descriptor, folder):
                os.close(descriptor)
                path.unlink(missing_ok=True)
                return False
            if _is_at(descriptor, path):  # the earlier run may have removed the file after it was opened
                os.ftruncate(descriptor, 0)
                os.write(descriptor, json.dumps(_this_run()).encode()[:_MOST_BYTES])
                _HELD[folder] = descriptor
                return True
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        if error.errno in _TAKEN:
            raise ConfigurationError(
                f"another run writes to {str(folder)!r}: {_holder(descriptor)}; wait for its end, or give this run "
                "another --run_folder (and another dirpath for its checkpoints, where the config sets one)"
            ) from error
        if error.errno not in _NO_LOCKS:
            raise
    rank_zero_warn(f"the file system of {str(folder)!r} has no locks: make sure that no other run writes there")
    return False


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _unlock(folder: Path) -> None:
    descriptor = _HELD.pop(folder)
    with contextlib.suppress(OSError):  # the folder may be gone, or read-only by now
        if _is_at(descriptor, folder / LOCK_NAME):
            os.unlink(folder / LOCK_NAME)
    os.close(descriptor)


def _this_run() -> dict[str, str | int]:
    return {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": shlex.join(["orthotrain", *sys.argv[1:]])[:2000],
    }


def _holder(descriptor: int) -> str:
    """Return the run that holds the lock, as its file describes it."""
    try:
        run = json.loads(os.pread(descriptor, _MOST_BYTES, 0))
        text = "process {process} on {host}, since {since}: {command}".format_map(run)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "its lock file does not name it yet"  # the run has just started
    return visible(text)
