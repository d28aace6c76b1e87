"""The file of results: one JSON object a line, on the disk before the next case begins.

A case writes two lines: one with ``begun`` before it runs, and one with its result. So the file names the case in which
a process died. A stage that is started again with the same file records that case as an error, does not repeat cases
that have a result, and runs the others.
"""

import json
import os
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

LOST = 75
"""Exit code of a stage that has lost its device: a new process can run the next cases."""


class Case(NamedTuple):
    """One measurement.

    Args:
        name: Unique in its stage, and the same in a rehearsal.
        run: Returns the result, plain values by name.
        seconds: Expected time. The case is skipped if the stage has less time left.
    """

    name: str
    run: Callable[[], dict[str, Any]]
    seconds: float = 0.0


class Record:
    """Runs cases and appends their results.

    Args:
        path: The file of results.
        stage: Number of the stage.
        seconds: The budget of this process; no case is begun that would end after it.
        common: Values that every line has.
        only: Cases whose name does not contain this text are passed over.
        released: Called after each case, to give memory back.
        is_lost: Tells whether the process has lost its device by an error.
    """

    def __init__(
        self,
        path: Path,
        stage: int,
        seconds: float,
        common: dict[str, Any],
        only: str = "",
        released: Callable[[], None] = lambda: None,
        is_lost: Callable[[BaseException], bool] = lambda error: False,
    ) -> None:
        self.path, self.stage, self.only = path, stage, only
        self.deadline = time.monotonic() + seconds
        self.common, self.released, self.is_lost = common, released, is_lost
        before = [line for line in read_lines(path) if line["stage"] == stage] if path.exists() else []
        self.ended = {line["case"] for line in before if "begun" not in line}
        self.begun = {line["case"] for line in before if "begun" in line}

    def take(self, cases: Iterable[Case]) -> None:
        """Run cases in their order; an error is recorded and the next case taken.

        Raises:
            SystemExit: The process has lost its device (:data:`LOST`).
        """
        for case in cases:
            if self.only not in case.name or case.name in self.ended:
                continue
            if case.name in self.begun:
                self.append(case.name, error="the process ended in this case")
            elif time.monotonic() + case.seconds > self.deadline:
                self.append(case.name, skipped="the stage's time was spent")
            else:
                self._run(case)

    def _run(self, case: Case) -> None:
        self.append(case.name, begun=True)
        start, lost = time.monotonic(), False
        try:
            found = case.run()
        except Exception as error:
            found, lost = {"error": described(error)}, self.is_lost(error)
            traceback.print_exc()
        self.append(case.name, seconds=round(time.monotonic() - start, 3), **found)
        if lost:
            raise SystemExit(LOST)
        self.released()

    def append(self, case: str, **values: Any) -> None:
        """Write one line and wait until it is on the disk."""
        append_line(self.path, {"stage": self.stage, "case": case, **self.common, **values})


def append_line(path: Path, values: dict[str, Any]) -> None:
    """Append one line to a file that several processes may append to, and wait until it is on the disk."""
    text = json.dumps(values) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, text.encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file of results; a line that is not whole JSON is replaced by an error that says so."""
    return [_parsed(text, number) for number, text in enumerate(path.read_text("utf-8").splitlines(), 1)]


def _parsed(text: str, number: int) -> dict[str, Any]:
    try:
        line = json.loads(text)
        if isinstance(line, dict) and {"stage", "case"} <= line.keys():
            return line
    except ValueError:
        pass
    return {"stage": 0, "case": f"line {number}", "error": "the line is not whole"}


def described(error: BaseException) -> str:
    """Return class and message of an error in one line, and where in the source it was raised."""
    message = " ".join(str(error).split())[:400]
    frames = traceback.extract_tb(error.__traceback__)
    where = f" [{Path(frames[-1].filename).name}:{frames[-1].lineno}]" if frames else ""
    return f"{type(error).__name__}: {message}{where}"
