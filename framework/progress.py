"""How far a long step has come: one line that renews itself on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_only

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_RENEWALS = 0.2
_SCALES = {"MB": 1e6}


class Progress:
    """Shows one long step, with its rate and the time that is left where the total is known.

    A terminal shows a bar on standard error, which disappears at the end; a file or a pipe, and a terminal that cannot
    move its cursor, gets a line of the log at the beginning and every ``seconds`` seconds.

    Args:
        what: The step: ``tokenizing``.
        total: How much there is to do, None where that is not known.
        unit: ``MB`` for something counted in bytes, else the plural of what is counted.
        seconds: Time between two lines of a log.
        first: How much of the total was done before.
        announce: Whether a log gets a line at the beginning.
    """

    def __init__(
        self,
        what: str,
        total: float | None,
        unit: str = "MB",
        seconds: float = SECONDS_BETWEEN_LINES,
        first: float = 0,
        announce: bool = True,
    ) -> None:
        self.what, self.total, self.unit, self.seconds = what, total, unit, seconds
        self.first = self.done = first
        self.announce = announce
        self.started = self._shown = time.monotonic()
        self._bar: Any = None
        self._line = what

    def __enter__(self) -> "Progress":
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> "Progress":
        """Show the bar, or announce the step."""
        self.open()
        if self._bar is None and self.announce:
            say(self.what if self.total is None else f"{self.what}: {amount(self.total, self.unit)}")
        return self

    def open(self) -> None:
        """Show the bar, on a terminal that can."""
        if not is_interactive():
            return
        from rich import progress
        from rich.console import Console
        from rich.table import Column

        console = Console(stderr=True)
        text = progress.TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis"))
        bars = [progress.BarColumn(bar_width=20)] if console.width >= 80 else []
        self._bar = progress.Progress(*bars, text, console=console, transient=True)
        self._bar.add_task(self._line, total=self.total, completed=self.done)
        self._bar.start()

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def advance(self, more: float = 1, note: Callable[[], str] | None = None) -> None:
        """Count what was done.

        Args:
            more: How much.
            note: Tells what else to show; called only when something is shown.
        """
        self.done += more
        now = time.monotonic()
        if now - self._shown < (self.seconds if self._bar is None else SECONDS_BETWEEN_RENEWALS):
            return
        self._shown = now
        parts = (self.account(now - self.started), note() if note else "")
        self._line = f"{self.what}: {', '.join(part for part in parts if part)}"
        if self._bar is None:
            say(self._line)
        else:
            self._bar.update(self._bar.task_ids[0], completed=self.done, description=self._line)

    def account(self, seconds: float) -> str:
        """Return how far the step is after some seconds: ``34.2 of 120.0 MB, 0:21 left, 4.1 MB/s``."""
        rate = (self.done - self.first) / seconds if seconds > 0 else 0.0
        unit = self.unit
        if self.total is None:
            parts = [amount(self.done, unit)]
        else:
            parts = [f"{_number(self.done, unit)} of {amount(self.total, unit)}"]
            if rate > 0:  # before the rate: a narrow terminal cuts off the end
                parts.append(f"{duration(max(self.total - self.done, 0) / rate)} left")
        if rate > 0:
            parts.append(f"{rate / _SCALES.get(unit, 1):.3g} {unit}/s")
        return ", ".join(parts)


def say(line: str) -> None:
    """Log a line where Lightning logs its own, on the first rank."""
    from lightning.pytorch.utilities.rank_zero import rank_zero_info  # seconds, which a layer's import need not take

    rank_zero_info(line)


def is_interactive() -> bool:
    """Tell whether standard error is a terminal that can renew a line, and this process the first of the run."""
    if not sys.stderr.isatty() or bool(getattr(rank_zero_only, "rank", None)):
        return False
    from rich.console import Console

    return not Console(stderr=True).is_dumb_terminal


def amount(total: float, unit: str) -> str:
    """Return an amount with its unit: ``120.0 MB``, ``24 layers``."""
    return f"{_number(total, unit)} {unit}"


def duration(seconds: float) -> str:
    """Return seconds as ``m:ss``, or ``h:mm:ss`` from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _number(value: float, unit: str) -> str:
    return f"{value / _SCALES[unit]:.1f}" if unit in _SCALES else f"{value:,.0f}"
