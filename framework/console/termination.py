"""SIGTERM and Ctrl-C: a handler only records the signal, and the program ends at its next safe point.

An exception that a handler raises would appear at an arbitrary place. Inside ``__del__``, the callback of a weak
reference or an import, Python would ignore the exception, and the run would continue. A recorded signal cannot be lost:
:func:`check` looks for it between the steps of the program, and ``main`` looks once more before it returns.
"""

import _thread
import contextlib
import os
import signal
import time
from types import FrameType

INTERRUPTED = "interrupted; run the same command again"
SIGNALS = (signal.SIGTERM, signal.SIGINT)
NAMES = {int(signal.SIGTERM): "SIGTERM", int(signal.SIGINT): "Ctrl-C"}
PATIENCE = 20.0
"""Seconds within which the program must reach a safe point; after them it ends, since a call may block for ever."""

_AGAIN = b"\nCtrl-C: ending at the next safe point (in training: after this step); press again to end at once\n"


class Ended(SystemExit):
    """Ends the program at a safe point after a signal; the exit code is 128 plus the number of the signal.

    Args:
        signum: The signal.
        message: The line that the command prints; empty for none.
    """

    def __init__(self, signum: int, message: str = INTERRUPTED) -> None:
        super().__init__(128 + signum)
        self.message = message


class _State:
    """The signals that one process has received since it listens."""

    def __init__(self) -> None:
        self.process, self.thread = os.getpid(), _thread.get_ident()
        self.signal = self.interrupts = 0
        self.held = False


_noted: _State | None = None


def listen() -> dict[int, object]:
    """Record SIGTERM and SIGINT from now on, also where Lightning has set a handler in the meantime.

    A signal that the process ignored from its start stays ignored, and a SIGINT handler of the user stays in place.

    Returns:
        The handlers that this call has replaced, for :func:`give_back`. Outside of the main thread it replaces none.
    """
    global _noted
    noted = _noted if listening() else _State()
    before: dict[int, object] = {}
    for signum in SIGNALS:
        handler = signal.getsignal(signum)
        own = signum == signal.SIGINT and handler not in (signal.SIG_DFL, signal.default_int_handler)
        if handler is signal.SIG_IGN or (handler is _note and _noted is noted) or (own and handler is not _note):
            continue
        _noted, earlier = noted, _noted
        try:
            signal.signal(signum, _note)
        except ValueError:  # only the main thread may set handlers
            _noted = earlier
            return {}
        before[int(signum)] = handler
    return before


def give_back(before: dict[int, object], ending: bool = False) -> int:
    """Restore the earlier handlers; return the signal that was recorded, 0 for none.

    Args:
        before: The handlers that :func:`listen` has returned.
        ending: Let signals end the process instead. Python's own handler of Ctrl-C would raise an exception during the
            interpreter's clean-up, where it is lost.
    """
    for signum, handler in before.items():
        signal.signal(signum, signal.SIG_DFL if ending else handler)  # type: ignore[arg-type]
    return _noted.signal if before and _noted is not None else 0


def listening() -> bool:
    """Tell whether this process records signals; a forked process does not."""
    mine = _noted is not None and _noted.process == os.getpid()
    return mine and any(signal.getsignal(signum) is _note for signum in SIGNALS)


def asked() -> int:
    """Return the signal that this process has recorded, 0 for none."""
    return _noted.signal if _noted is not None and listening() else 0


def check() -> None:
    """End the program if a signal was recorded. The call marks a safe point, at which the program may stop.

    The call does nothing outside of the main thread, and while :func:`hold` is in effect.

    Raises:
        Ended: If a signal was recorded.
    """
    if _noted is not None and _noted.signal and not _noted.held and _thread.get_ident() == _noted.thread and asked():
        raise Ended(_noted.signal)


def hold(held: bool = True) -> None:
    """Let :func:`check` do nothing, because training ends only between two steps, and on all ranks at once."""
    if _noted is not None:
        _noted.held = held


def _note(signum: int, frame: FrameType | None) -> None:
    """Record a signal; a second Ctrl-C ends the process at once."""
    noted = _noted
    assert noted is not None
    noted.interrupts += signum == signal.SIGINT
    if os.getpid() != noted.process:
        # A forked helper has inherited this handler. A terminal sends Ctrl-C to helpers too, but the parent still needs
        # them for the current step, and ends them itself.
        if signum != signal.SIGINT or noted.interrupts > 1:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        return
    if noted.interrupts > 1:
        os._exit(128 + signum)
    if signum == signal.SIGINT and os.environ.get("LOCAL_RANK", "0") == "0":
        _write(_AGAIN)
    if not noted.signal:
        noted.signal = int(signum)
        with contextlib.suppress(RuntimeError):  # no more threads: a safe point still ends the program
            # not threading.Thread: the code that this handler has interrupted may hold its lock
            _thread.start_new_thread(_end_late, (noted,))


def _end_late(noted: _State) -> None:
    """End a process that reaches no safe point, because it waits for a lock or reads a pipe."""
    waited = 0.0
    while waited < PATIENCE:
        time.sleep(0.1)
        waited = 0.0 if noted.held else waited + 0.1
        if _noted is not noted or not listening():
            return
    _write(f"orthotrain: error: {INTERRUPTED}\n".encode())
    os._exit(128 + noted.signal)


def _write(line: bytes) -> None:
    with contextlib.suppress(OSError):
        os.write(2, line)  # not print: the signal may have interrupted a print
