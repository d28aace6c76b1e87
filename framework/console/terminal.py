"""The last line of a terminal: it renews itself, and what others print or log meanwhile stands above it, whole."""

import logging
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any, Protocol

from lightning_utilities.core.rank_zero import rank_zero_only

BAR_WIDTH, WIDE_ENOUGH_FOR_A_BAR = 20, 100


class Line(Protocol):
    """What the line says."""

    @property
    def fraction(self) -> float | None:
        """How much of it is done, from 0 to 1; None where that is not known."""

    def text(self, width: int | None = None) -> str:
        """Return what fits into so many columns."""


def is_interactive() -> bool:
    """Tell whether standard error is a terminal that can renew a line, and this process the first of the run."""
    if not sys.stderr.isatty() or bool(getattr(rank_zero_only, "rank", None)):
        return False
    from rich.console import Console

    return not Console(stderr=True).is_dumb_terminal


class Foot:
    """The last line of this process's terminal, on standard error; of several steps the innermost has it.

    While it is there, standard error and the handlers of loggers that write to it are led past it, and standard output
    where that is the terminal too; output that goes into a file or a pipe is left alone.
    """

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self._live: Any = None
        self._streams = (sys.stdout, sys.stderr)
        self._handlers: list[tuple[logging.StreamHandler, Any]] = []
        self._lock = threading.RLock()

    def show(self, line: Line) -> None:
        """Give the line to a step."""
        with self._lock:
            self.lines.append(line)
            if self._live is None:
                self._start()
            self._live.refresh()

    def renew(self, line: Line) -> None:
        """Draw it again, if that step has it."""
        with self._lock:
            if self._live is not None and self.lines[-1] is line:
                self._live.refresh()

    def drop(self, line: Line) -> None:
        """Give it back to the step around, or take it away."""
        with self._lock:
            if self.lines == [line]:
                self._live.stop()
                self._live = None
                for handler, stream in self._handlers:
                    handler.setStream(stream)
            if line in self.lines:
                self.lines.remove(line)
            self.renew(self.lines[-1] if self.lines else line)

    def _start(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._streams = (sys.stdout, sys.stderr)
        # lines of others are not to be cut into pieces: their paths are copied
        console = Console(stderr=True, soft_wrap=True)
        console.show_cursor = lambda show=True: False  # type: ignore[method-assign] # a killed run could not give it back
        drawn, data = _Drawn(self), not sys.stdout.isatty()
        self._live = Live(drawn, console=console, auto_refresh=False, transient=True, redirect_stdout=not data)
        self._live.start()
        self._handlers = [(h, h.stream) for h in _stream_handlers() if h.stream in self._streams and h.stream.isatty()]
        for handler, _ in self._handlers:
            handler.setStream(sys.stderr)

    def forget(self) -> None:
        """In a forked worker: write where the terminal is, and wait for no lock that a thread of the parent held."""
        if self._live is None:
            return
        sys.stdout, sys.stderr = self._streams
        for handler, stream in self._handlers:
            handler.stream = stream
        self._live, self.lines, self._lock = None, [], threading.RLock()


class _Drawn:
    """Draws the innermost step's line: a bar where there is room for one, and the text."""

    def __init__(self, foot: Foot) -> None:
        self.foot = foot

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        line, room = self.foot.lines[-1], console.width - 1  # the last column may bring the cursor to the next line
        cells: list[Any] = []
        if line.fraction is not None and console.width >= WIDE_ENOUGH_FOR_A_BAR:
            cells.append(ProgressBar(1.0, line.fraction, width=BAR_WIDTH))
            room -= BAR_WIDTH + 1
        cells.append(Text(line.text(room), no_wrap=True, overflow="crop"))
        grid = Table.grid(padding=(0, 1, 0, 0))
        grid.add_row(*cells)
        yield grid


def _stream_handlers() -> list[logging.StreamHandler]:
    known = logging.Logger.manager.loggerDict.values()
    loggers = [logging.getLogger(), *(logger for logger in known if isinstance(logger, logging.Logger))]
    handlers = [handler for logger in loggers for handler in logger.handlers]
    return [handler for handler in dict.fromkeys(handlers) if isinstance(handler, logging.StreamHandler)]


FOOT = Foot()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: FOOT.forget())
