"""The standard streams of a command: closed ones do no harm, and a reader that has gone is told from other errors."""

import os
import sys


def open_standard_streams() -> bool:
    """Lead every closed standard stream to the null device; return whether standard output was open.

    Without that, the next file that is opened would take the number of the closed stream, and whatever a library
    prints would be written into that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    was_open = sys.stdout is not None
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    return was_open


def reader_is_gone() -> bool:
    """Tell whether standard output is a pipe that nobody reads any longer."""
    import select

    poll = select.poll()
    poll.register(1, 0)
    return any(events & (select.POLLERR | select.POLLNVAL) for _, events in poll.poll(0))


def silence_standard_output() -> None:
    """Lead standard output to the null device: the interpreter flushes once more when it exits."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
