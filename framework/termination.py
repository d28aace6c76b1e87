"""Ending where no training is under way (building caches, exporting) as a signal asks, without a traceback."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

INTERRUPTED = "interrupted; run the same command again"


class Terminated(BaseException):
    """SIGTERM arrived; no Exception, so that only the end of a program catches it."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM raise :class:`Terminated`, except while a trainer has a handler of its own in this one's place."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    process = os.getpid()

    def terminate(signum: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # a forked worker has the handler, but not what catches the exception
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        elif signal.getsignal(signum) is terminate:  # Lightning's handler calls this one too, and ends a run itself
            raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
