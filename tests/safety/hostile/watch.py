"""What a process of the harness notes about itself: programs it starts, hosts it asks, files it changes elsewhere."""

import json
import os
import sys
from pathlib import Path
from typing import Any

PROGRAMS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn")
HOSTS = ("socket.connect", "socket.getaddrinfo", "urllib.Request", "webbrowser.open")
CHANGES = {
    "os.remove": 1, "os.rename": 2, "os.rmdir": 1, "os.mkdir": 1, "os.link": 2, "os.symlink": 2, "os.truncate": 1,
    "os.chmod": 1, "os.chown": 1, "shutil.rmtree": 1, "shutil.move": 2,
}  # fmt: skip
KIND_OF = {"import": "import", **dict.fromkeys(PROGRAMS, "program"), **dict.fromkeys(HOSTS, "host")}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def changed(event: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the paths that an event changes."""
    if event == "open":
        return arguments[:1] if isinstance(arguments[2], int) and arguments[2] & WRITES else ()
    return arguments[: CHANGES.get(event, 0)]


def watch(folder: Path, home: str, log: int) -> None:
    """Write a line of JSON to the file ``log`` for everything of interest that this process does from now on.

    Args:
        folder: Where it may write.
        home: The home of the server: some packages choose their folder of caches when they are imported.
        log: An open file descriptor.
    """
    inside = (f"{os.path.realpath(folder)}/", f"{os.path.realpath(home)}/", "/dev/", "/proc/self/", "/memfd:")
    noting = False

    def outside(path: Any) -> bool:
        if not isinstance(path, str | bytes | os.PathLike) or not os.path.isabs(path):
            return False  # a number of an open file, or a name in the working folder
        path = os.fsdecode(path)
        real = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
        return not real.startswith(inside) and not f"{real}/".startswith(inside)

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal noting
        if noting:
            return
        noting = True
        try:
            kind = KIND_OF.get(event) or ("change" if any(map(outside, changed(event, arguments))) else None)
            if kind is not None:
                arguments = arguments[:1] if kind == "import" else arguments
                os.write(log, (json.dumps([kind, event, repr(arguments)[:300]]) + "\n").encode())
        except (OSError, ValueError):
            pass
        finally:
            noting = False

    sys.addaudithook(note)
