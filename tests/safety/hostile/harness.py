"""The pytest side of the harness: asks the server for a process, and judges what that process did."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

SERVER = Path(__file__).parent / "server.py"
SECONDS = int(os.environ.get("ORTHOTRAIN_SAFETY_SECONDS", "60"))
REFUSED, DIVERGED, FINE = 2, 1, 0
ERROR = "orthotrain: error: "
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
"""What libraries write around words; it changes nothing but colours."""
BAD_ADVICE = re.compile(
    r"\b(re-?running|set(ting)?|pass(ing)?|us(e|ing)|chang(e|ing)|try)\b[^.;]{0,60}weights_only"
    r"|trusted source|safe_globals",
    re.IGNORECASE,
)
# what a terminal acts upon, and what turns the direction of a line around
ESCAPES = re.compile("[\x00-\x08\x0b-\x1f\x7f\x80-\x9f\u202a-\u202e\u2066-\u2069]")
TRAPS = {"antigravity", "this", "trap_module", "turtle", "idlelib", "ensurepip", "lib2to3", "turtledemo"}
"""Modules that no run imports: only a name in a file leads to them."""


@dataclass
class Outcome:
    """How a process ended.

    Attributes:
        code: The exit code; a negative one names the signal.
        in_time: Whether it ended by itself.
        seconds: Wall time.
        kilobytes: Most memory it held.
        stdout: All of it.
        stderr: All of it.
        events: What it did by kind (see watch.py).
    """

    code: int
    in_time: bool
    seconds: float
    kilobytes: int
    stdout: str
    stderr: str
    events: dict[str, list[str]] = field(default_factory=dict)

    @property
    def imports(self) -> set[str]:
        """Top-level names of the modules that it looked for."""
        return {name.split(".")[0] for name in self.events["import"]}


class Server:
    """The process that forks (see server.py)."""

    def __init__(self, folder: Path) -> None:
        (folder / "home").mkdir(parents=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        environment |= {name: str(folder / "home") for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME")}
        environment.pop("PYTEST_CURRENT_TEST", None)
        environment.pop("TORCHINDUCTOR_CACHE_DIR", None)  # another test of this process may have made torch set it
        self._log = (folder / "server.log").open("w")
        self._process = subprocess.Popen(
            [sys.executable, str(SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            raise RuntimeError((folder / "server.log").read_text())

    def run(self, folder: Path, arguments: list, entry: str = "", closed=(), links=(), seconds=SECONDS) -> Outcome:
        """Run the command line, or a function of entries.py, in ``folder/work`` and return how it went."""
        for name in ("work", "scratch"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / "log").unlink(missing_ok=True)
        request = {"folder": str(folder), "arguments": [a if entry else str(a) for a in arguments]}
        request |= {"closed": list(closed), "links": [list(map(str, pair)) for pair in links], "seconds": seconds}
        if entry:
            request["entry"] = entry
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        events: dict[str, list[str]] = defaultdict(list)
        for line in (folder / "log").read_text().splitlines():
            kind, event, said = json.loads(line)
            events[kind].append(said[2:].split("'")[0] if kind == "import" else f"{event}{said}")
        texts = {name: (folder / name).read_bytes().decode(errors="replace") for name in ("stdout", "stderr")}
        return Outcome(**answer, **texts, events=events)

    def close(self) -> None:
        """End it; its children are gone by then."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._log.close()


def plant_canary(folder: Path) -> Path:
    """Make a folder of files, folders and links that nothing may touch."""
    canary = folder / "canary"
    (canary / "sub" / "deep").mkdir(parents=True)
    names = ("a.txt", "x.old", ".x.old", ".x.partial", ".last.ckpt.partial", "last.ckpt", "sub/deep/weights.bin")
    for name in (*names, "step-000002", "config.yaml", "best.ckpt", "sub/.last.ckpt.old"):
        (canary / name).write_bytes(f"canary {name}\n".encode() * 7)
    (canary / "link").symlink_to("a.txt")
    (canary / "dangling").symlink_to("nowhere")
    (canary / "sub" / "up").symlink_to("..")
    return canary


def listing(folder: Path) -> dict[str, str]:
    """Return every path below a folder with what it is: the hash of a file, the target of a link."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_file():
            found[name] = f"{path.stat().st_mode:o} {hashlib.sha256(path.read_bytes()).hexdigest()}"
        else:
            found[name] = "folder"
    return found


def faults(outcome: Outcome, codes: tuple[int, ...], names: tuple[str, ...] = (), silent: bool = False) -> list[str]:
    """Return what is wrong with how a process ended, a line each.

    Args:
        outcome: How it ended.
        codes: Exit codes that are right.
        names: Words of which the error must hold one; any case.
        silent: Whether standard error was closed, so that no error can be looked for.
    """
    wrong = []
    errors = [line for line in outcome.stderr.splitlines() if line.startswith(ERROR)]
    both = outcome.stdout + outcome.stderr
    if not outcome.in_time:
        wrong.append(f"it took more than {SECONDS} s")
    if outcome.code not in codes:
        last = outcome.stderr.strip().splitlines()[-1:] or [""]
        wrong.append(f"exit code {outcome.code}, not one of {codes}: {last[0][:300]}")
    if "Traceback (most recent call last)" in both:
        wrong.append("a traceback")
    if outcome.code and not silent:
        if len(errors) != 1 or not outcome.stderr.splitlines()[-1].startswith(ERROR):
            wrong.append(f"{len(errors)} lines of error, the last line must be the only one")
        elif names and not any(name.lower() in errors[0].lower() for name in names):
            wrong.append(f"the error names none of {names}: {errors[0][:300]}")
        elif len(errors[0]) > 10_000:
            wrong.append(f"the error is {len(errors[0])} characters long")
    if not outcome.code and errors:
        wrong.append("an error and exit code 0")
    if found := ESCAPES.search(COLOURS.sub("", both)):
        wrong.append(f"the output holds {found.group()!r}")
    if BAD_ADVICE.search(both):
        wrong.append("the output advises to read a file unsafely")
    for kind, said in (("program", "it started"), ("host", "it asked"), ("change", "it changed")):
        wrong += [f"{said} {event}"[:300] for event in outcome.events.get(kind, [])[:3]]
    if led := outcome.imports & TRAPS:
        wrong.append(f"it looked for the module {', '.join(sorted(led))}")
    return wrong
