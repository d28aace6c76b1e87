"""Progress of a long step: a status line on a terminal, a line every 30 seconds in a log."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from pathlib import Path
from typing import Any, TypeVar

from orthotrain.console.terminal import FOOT, is_interactive
from orthotrain.console.termination import check

SECONDS_BETWEEN_LINES = 30.0
SECONDS_BETWEEN_RENEWALS = 0.2
SECONDS_BEFORE_A_BAR = 2.0
_SCALES = {"MB": 1e6}

Item = TypeVar("Item")

_RUNNING: list["Progress"] = []
"""The nested steps that are running, the innermost last."""


class Progress:
    """Shows one long step on standard error, with its rate and, if the total is known, the remaining time.

    A terminal shows a status line after ``delay`` seconds, with a bar if the terminal is wide enough, and removes the
    line at the end. A file, a pipe and a terminal that cannot move its cursor get a log line every ``seconds`` seconds.
    A short step shows nothing. Of nested steps the innermost one is shown.

    Args:
        what: Name of the step: ``tokenizing``.
        total: The total amount, None if it is not known.
        unit: ``MB`` for an amount in bytes, else the plural of the items that are counted; empty if nothing is counted.
        seconds: Time between two log lines.
        first: The amount that was done before this run.
        announce: Whether a log gets a line at the start.
        delay: Time before a terminal shows the step.
        watch: Returns the amount that is done; a thread calls it. For a step that is a single call.
    """

    def __init__(
        self,
        what: str,
        total: float | None,
        unit: str = "MB",
        seconds: float = SECONDS_BETWEEN_LINES,
        first: float = 0,
        announce: bool = False,
        delay: float = SECONDS_BEFORE_A_BAR,
        watch: Callable[[], float] | None = None,
    ) -> None:
        self.what, self.total, self.unit, self.seconds, self.delay = what, total, unit, seconds, delay
        self.first = self.done = first
        self.announce, self.watch = announce, watch
        self.tokens = 0.0
        self.started = self._renewed = time.monotonic()
        self._note = ""
        self._terminal = self._shown = False
        self._ended = threading.Event()
        self._watcher: threading.Thread | None = None

    def __enter__(self) -> "Progress":
        return self.start()

    def __exit__(self, *raised: object) -> None:
        self.close()

    def start(self) -> "Progress":
        """Start the clock and announce the step. This call is a safe point, as every :meth:`advance` is."""
        check()
        self.started = self._renewed = time.monotonic()
        self._terminal = is_interactive()
        _RUNNING.append(self)
        if self.announce and not self._terminal:
            begun = f"{_number(self.first, self.unit)} of " if self.first else ""
            say(self.what if self.total is None else f"{self.what}: {begun}{amount(self.total, self.unit)}")
        if self.watch is not None:
            self._watcher = threading.Thread(target=self._keep_watching, daemon=True)
            self._watcher.start()
        if self._terminal:
            self._renew()
        return self

    def turn(self, what: str) -> None:
        """Go on to a part of the step whose amount is not known, only its time."""
        self.what, self.total, self.unit = what, None, ""
        self.started, self.watch = time.monotonic(), lambda: 0.0

    def close(self) -> None:
        """Remove the line."""
        self._ended.set()
        if self._watcher is not None:
            self._watcher.join()
        FOOT.drop(self)
        self._shown = False
        if self in _RUNNING:
            _RUNNING.remove(self)

    def advance(self, more: float = 1, note: Callable[[], str] | None = None, tokens: float = 0) -> None:
        """Count an amount that was done.

        Args:
            more: The amount.
            note: Returns more text to show, separated by ``, ``; called only when the line is shown.
            tokens: Tokens in the amount, if the rate is to be shown in tokens per second.
        """
        self.done += more
        self.tokens += tokens
        self._renew(note)
        check()

    def _renew(self, note: Callable[[], str] | None = None) -> None:
        """Show the line if it is due."""
        now = time.monotonic()
        if self._terminal and not self._shown:
            due = now - self.started >= self.delay
        else:
            due = now - self._renewed >= (SECONDS_BETWEEN_RENEWALS if self._terminal else self.seconds)
        if not due or _RUNNING[-1:] != [self]:
            return
        self._renewed = now
        self._note = note() if note else self._note
        if not self._terminal:
            say(self.text())
        elif self._shown:
            FOOT.renew(self)
        else:
            self._shown = True
            FOOT.show(self)

    def _keep_watching(self) -> None:
        while not self._ended.wait(SECONDS_BETWEEN_RENEWALS):
            if self.watch is not None:
                self.done = self.watch()
            self._renew()

    @property
    def fraction(self) -> float | None:
        """The part that is done; None if the total is not known or was too low."""
        return self.done / self.total if self.total and self.done <= self.total else None

    def text(self, width: int | None = None) -> str:
        """Return the line: ``tokenizing: 34.2 of 120.0 MB, 0:21 left, 900,000 tokens/s``.

        Args:
            width: Columns of the line. To fit, the rate is dropped first, then the notes, then the remaining time.
        """
        done, rate, left = self.account(time.monotonic() - self.started)
        noted = self._note.split(", ") if self._note else []
        parts = [done, *([left] if left else []), *([rate] if rate else []), *noted]
        removable = [*([rate] if rate else []), *reversed(noted), *([left] if left else [])]
        while width is not None and removable and len(self.what) + 2 + len(", ".join(parts)) > width:
            parts.remove(removable.pop(0))
        rest = f": {', '.join(parts)}"
        what = self.what
        if width is not None and len(what) + len(rest) > width:
            what = f"{what[: max(0, width - len(rest) - 1)]}…"
        return f"{what}{rest}"[:width]

    def account(self, seconds: float) -> tuple[str, str, str]:
        """Return the amount done after some seconds, the rate and the remaining time; empty text for an unknown one."""
        more, unit = self.done - self.first, self.unit
        rate = more / seconds if seconds > 0 else 0.0
        left = ""
        if self.total is None or self.done > self.total:
            done = f"{amount(self.done, unit)} in {duration(seconds)}" if unit else duration(seconds)
        else:
            done = f"{_number(self.done, unit)} of {amount(self.total, unit)}"
            left = f"{duration((self.total - self.done) / rate)} left" if rate > 0 else ""
        if rate <= 0 or not unit:
            return done, "", left
        if self.tokens:
            return done, f"{per_second(self.tokens / seconds)} tokens/s", left
        return done, f"{per_second(rate / _SCALES.get(unit, 1))} {unit}/s", left


def waiting(what: str) -> Progress:
    """Return the progress of a step that is a single call; it shows the elapsed time."""
    return Progress(what, None, "", watch=lambda: 0.0)


def writing(what: str, path: Path, total: float) -> Progress:
    """Return the progress of a step that writes a file, or a folder of files, of about ``total`` bytes."""
    return Progress(what, total, watch=lambda: bytes_in(path))


@contextlib.contextmanager
def shown(items: Iterable[Item], what: str, unit: str) -> Iterator[Iterator[Item]]:
    """Give the items of a step, and show how many are done until the ``with`` block ends.

    The step ends with the block. A generator alone would end it late: an error in the loop's body keeps the generator
    alive until Python frees the error's traceback.
    """
    with Progress(what, len(items) if isinstance(items, Sized) else None, unit) as bar:

        def counted() -> Iterator[Item]:
            for item in items:
                yield item
                bar.advance()

        yield counted()


@contextlib.contextmanager
def transformers_bars(
    show: Callable[[Iterable[Any]], contextlib.AbstractContextManager[Iterable[Any]]] = contextlib.nullcontext,
) -> Iterator[None]:
    """Replace the progress bars of transformers, which a log could not read; by default they are left out.

    Args:
        show: Gets the items that a bar would count, and returns a context that gives the items, such as :func:`shown`.
    """
    from transformers.utils import logging

    def hook(factory: Callable[..., Any], given: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if not given or given[0] is None:
            return factory(*given, **options)
        return steps.enter_context(show(given[0]))

    before = logging.set_tqdm_hook(hook)
    try:
        with contextlib.ExitStack() as steps:
            yield
    finally:
        logging.set_tqdm_hook(before)


def say(line: str) -> None:
    """Log a line on rank 0, where Lightning logs its own lines."""
    # here, because the import of a layer must not wait seconds for Lightning
    from lightning.pytorch.utilities.rank_zero import rank_zero_info

    rank_zero_info(line)


def bytes_in(path: Path) -> float:
    """Return the size of a file, or of the files in a folder; a missing file counts 0."""
    total = 0
    with contextlib.suppress(OSError):  # another thread writes and renames there
        for file in path.iterdir() if path.is_dir() else [path]:
            total += file.stat().st_size
    return total


def amount(total: float, unit: str) -> str:
    """Return an amount with its unit: ``120.0 MB``, ``24 layers``."""
    return f"{_number(total, unit)} {unit}"


def per_second(rate: float) -> str:
    """Return a rate with three digits, or with all digits before the point: ``0.0123``, ``12,345``."""
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def duration(seconds: float) -> str:
    """Return seconds as ``m:ss``, or ``h:mm:ss`` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _number(value: float, unit: str) -> str:
    return f"{value / _SCALES[unit]:,.1f}" if unit in _SCALES else f"{value:,.0f}"
