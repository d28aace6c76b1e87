"""The standard streams of a command: closed streams are replaced, and a pipe without a reader is detected."""

import os
import sys


def open_standard_streams() -> bool:
    """Open the null device in place of every closed standard stream; return whether standard output was open.

    Otherwise the next file that is opened would get the number of the closed stream, and everything that a library
    prints would be written into that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
    was_open = sys.stdout is not None
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    return was_open


def reader_is_gone() -> bool:
    """Tell whether standard output is a pipe whose reader has exited."""
    import select

    poll = select.poll()
    poll.register(1, 0)
    return any(events & (select.POLLERR | select.POLLNVAL) for _, events in poll.poll(0))


def silence_standard_output() -> None:
    """Replace standard output by the null device, because the interpreter flushes it once more when it exits."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
