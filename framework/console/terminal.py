"""The status line at the bottom of a terminal; other output appears above it, uncut."""

import logging
import os
import sys
import threading
from typing import Any, Protocol

from lightning_utilities.core.rank_zero import rank_zero_only

BAR_WIDTH, WIDE_ENOUGH_FOR_A_BAR = 20, 100


class Line(Protocol):
    """The content of the status line."""

    @property
    def fraction(self) -> float | None:
        """The part of the step that is done, from 0 to 1; None if it is not known."""

    def text(self, width: int | None = None) -> str:
        """Return the text of the line, in at most ``width`` columns."""


def is_interactive() -> bool:
    """Tell whether standard error is a terminal that can redraw a line, and this process is rank 0."""
    if not sys.stderr.isatty() or bool(getattr(rank_zero_only, "rank", None)):
        return False
    from rich.console import Console

    return not Console(stderr=True).is_dumb_terminal


class Foot:
    """The status line of this process's terminal, on standard error. Of nested steps the innermost one is shown.

    While the line is shown, standard error and the handlers of loggers that write to it are redirected so that their
    output appears above the line; standard output too if it is the terminal. Output to files and pipes is not changed.
    """

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self._live: Any = None
        self._streams = (sys.stdout, sys.stderr)
        self._handlers: list[tuple[logging.StreamHandler, Any]] = []
        self._lock = threading.RLock()

    def show(self, line: Line) -> None:
        """Show the line of a step."""
        with self._lock:
            self.lines.append(line)
            if self._live is None:
                self._start()
            self._live.refresh()

    def renew(self, line: Line) -> None:
        """Redraw the line, if it is the line of this step."""
        with self._lock:
            if self._live is not None and self.lines[-1] is line:
                self._live.refresh()

    def drop(self, line: Line) -> None:
        """Show the line of the surrounding step again, or remove the status line."""
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
        # without soft wrap rich would cut other lines into pieces, and with them the paths that users copy
        console = Console(stderr=True, soft_wrap=True)
        console.show_cursor = lambda show=True: False  # type: ignore[method-assign] # a killed run would leave it hidden
        self._live = Live(
            console=console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=sys.stdout.isatty(),
            get_renderable=lambda: self._drawn(console.width),
        )
        self._live.start()
        self._handlers = [(h, h.stream) for h in _stream_handlers() if h.stream in self._streams and h.stream.isatty()]
        for handler, _ in self._handlers:
            handler.setStream(sys.stderr)

    def _drawn(self, columns: int) -> Any:
        """Return the line of the innermost step: a bar if the terminal is wide enough, and the text."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        line, room = self.lines[-1], columns - 1  # the last column may wrap the line
        cells: list[Any] = []
        if line.fraction is not None and columns >= WIDE_ENOUGH_FOR_A_BAR:
            cells.append(ProgressBar(1.0, line.fraction, width=BAR_WIDTH))
            room -= BAR_WIDTH + 1
        cells.append(Text(line.text(room), no_wrap=True, overflow="crop"))
        grid = Table.grid(padding=(0, 1, 0, 0))
        grid.add_row(*cells)
        return grid

    def forget(self) -> None:
        """In a forked worker: restore the streams, and replace the lock, which a thread of the parent may have held."""
        if self._live is None:
            return
        sys.stdout, sys.stderr = self._streams
        for handler, stream in self._handlers:
            handler.stream = stream
        self._live, self.lines, self._lock = None, [], threading.RLock()


def _stream_handlers() -> list[logging.StreamHandler]:
    known = logging.Logger.manager.loggerDict.values()
    loggers = [logging.getLogger(), *(logger for logger in known if isinstance(logger, logging.Logger))]
    handlers = [handler for logger in loggers for handler in logger.handlers]
    return [handler for handler in dict.fromkeys(handlers) if isinstance(handler, logging.StreamHandler)]


FOOT = Foot()
os.register_at_fork(after_in_child=lambda: FOOT.forget())
