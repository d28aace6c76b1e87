"""Signals that ask a command to end: a handler only notes them, and the program ends at its next safe point.

An exception that a handler raises appears at an arbitrary place. Inside ``__del__``, a weak reference's callback or an
import it is swallowed, and the run goes on. A noted signal cannot be lost: :func:`check` looks for one between the
steps of the program, and ``main`` looks once more before it returns.
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
"""Seconds until a safe point must be reached where nothing can be lost; one call may block for ever."""

_AGAIN = b"\nCtrl-C: ending at the next safe point (in training: after this step); again to end at once\n"


class Ended(SystemExit):
    """The program ends at a safe point because a signal asked for it; the exit code is 128 and the signal's number.

    Args:
        signum: The signal.
        message: What the command says; empty where all has been said.
    """

    def __init__(self, signum: int, message: str = INTERRUPTED) -> None:
        super().__init__(128 + signum)
        self.message = message


class _Noted:
    """What one listening process has been told."""

    def __init__(self) -> None:
        self.process, self.thread = os.getpid(), _thread.get_ident()
        self.asked = self.interrupts = 0
        self.held = False


_noted: _Noted | None = None


def listen() -> dict[int, object]:
    """Note SIGTERM and SIGINT from now on, also where Lightning has set a handler of its own meanwhile.

    A signal that the process was started to ignore stays ignored, and a SIGINT handler of the user's own stays.

    Returns:
        The handlers that this call has replaced, for :func:`give_back`; none outside of the main thread.
    """
    global _noted
    noted = _noted if listening() else _Noted()
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
    """Set the handlers that there were before; return the signal that was noted, 0 for none.

    Args:
        before: What :func:`listen` returned.
        ending: Let signals end the process from now on instead; Python's own handler of Ctrl-C would raise an exception
            in the middle of its clean-up, where it is lost.
    """
    for signum, handler in before.items():
        signal.signal(signum, signal.SIG_DFL if ending else handler)  # type: ignore[arg-type]
    return _noted.asked if before and _noted is not None else 0


def listening() -> bool:
    """Tell whether this process notes signals (a forked one does not)."""
    mine = _noted is not None and _noted.process == os.getpid()
    return mine and any(signal.getsignal(signum) is _note for signum in SIGNALS)


def asked() -> int:
    """Return the signal that has asked this process to end, 0 for none."""
    return _noted.asked if _noted is not None and listening() else 0


def check() -> None:
    """End here if a signal has asked for it: this is a safe point, at which the program may stop.

    Nothing happens outside of the main thread, and while :func:`hold` is in effect.

    Raises:
        Ended: If a signal was noted.
    """
    if _noted is not None and _noted.asked and not _noted.held and _thread.get_ident() == _noted.thread and asked():
        raise Ended(_noted.asked)


def hold(held: bool = True) -> None:
    """Let :func:`check` do nothing: training ends between two steps only, and on all ranks at once."""
    if _noted is not None:
        _noted.held = held


def _note(signum: int, frame: FrameType | None) -> None:
    """Note a signal; a second Ctrl-C ends the process at once."""
    noted = _noted
    assert noted is not None
    noted.interrupts += signum == signal.SIGINT
    if os.getpid() != noted.process:
        # A forked helper has inherited this handler. A terminal sends Ctrl-C to helpers too: the parent still needs
        # them for the step under way, and ends them itself.
        if signum != signal.SIGINT or noted.interrupts > 1:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        return
    if noted.interrupts > 1:
        os._exit(128 + signum)
    if signum == signal.SIGINT and os.environ.get("LOCAL_RANK", "0") == "0":
        _write(_AGAIN)
    if not noted.asked:
        noted.asked = int(signum)
        with contextlib.suppress(RuntimeError):  # no more threads: a safe point ends the program all the same
            # not threading.Thread: its lock may be held by what this handler has interrupted
            _thread.start_new_thread(_end_late, (noted,))


def _end_late(noted: _Noted) -> None:
    """End a process that reaches no safe point, such as one that waits for a lock or reads a pipe."""
    waited = 0.0
    while waited < PATIENCE:
        time.sleep(0.1)
        waited = 0.0 if noted.held else waited + 0.1
        if _noted is not noted or not listening():
            return
    _write(f"orthotrain: error: {INTERRUPTED}\n".encode())
    os._exit(128 + noted.asked)


def _write(line: bytes) -> None:
    with contextlib.suppress(OSError):
        os.write(2, line)  # not print: the signal may have interrupted one
