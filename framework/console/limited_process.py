"""Processes with limits of memory and time, for work that the content of a file can make endless."""

import contextlib
import gc
import os
import resource
import signal
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

_WALL_SECONDS = 600
"""Longest wait for an answer. A process that computes ends much earlier, by its limit of processor time."""


class LimitExceeded(Exception):
    """The work exceeded its memory or time, or its process died of that; the message is one line."""


def start(work: Callable[[Connection], None], memory_bytes: int) -> tuple[int, Connection]:
    """Fork a process that runs ``work`` with its end of a connection.

    The new process shares the memory of this process, and must not use its threads, GPUs or files.

    Args:
        work: The work of the process, which ends when the function returns.
        memory_bytes: Address space of the process in addition to that of this process (on Linux).

    Returns:
        The process id, and this process's end of the connection.
    """
    ours, theirs = Pipe()
    with warnings.catch_warnings():  # Python warns of threads, but the new process takes none of their locks
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        theirs.close()
        return pid, ours
    try:
        ours.close()
        _prepare(memory_bytes)
        work(theirs)
    finally:
        os._exit(0)


def _prepare(memory_bytes: int) -> None:
    """Detach from the parent's objects and signals, and set the permanent limits."""
    gc.freeze()  # objects of the parent are not finalized here
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal also sends Ctrl-C to the parent, which ends this process
    for ending in (signal.SIGTERM, signal.SIGXCPU):
        signal.signal(ending, signal.SIG_DFL)
    _lower(resource.RLIMIT_CORE, 0)
    if (sizes := Path("/proc/self/statm")).exists():
        _lower(resource.RLIMIT_AS, int(sizes.read_text().split()[0]) * resource.getpagesize() + memory_bytes)


def limit_seconds(seconds: float) -> None:
    """Limit the processor time of this process to some seconds, rounded up."""
    _lower(resource.RLIMIT_CPU, int(seconds) + 1, raise_it=True)


def _lower(limit: int, value: int, raise_it: bool = False) -> None:
    soft, hard = resource.getrlimit(limit)
    bounds = [value, hard] if raise_it else [value, soft, hard]
    resource.setrlimit(limit, (min(bound for bound in bounds if bound != resource.RLIM_INFINITY), hard))


def receive(connection: Connection) -> Any:
    """Return the answer of a process.

    Raises:
        EOFError: The process has died or stopped answering.
    """
    try:
        if connection.poll(_WALL_SECONDS):
            return connection.recv()
    except OSError as error:
        raise EOFError from error
    raise EOFError


def end(pid: int, connection: Connection) -> str:
    """Close the connection, end the process and return the cause of its death."""
    connection.close()
    status = 0
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        finished, status = os.waitpid(pid, os.WNOHANG)
        if not finished:
            os.kill(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
        return "it computes for too long"
    return f"its process ended without an answer (status {status})"


def call_limited(function: Callable[[], Any], memory_bytes: int, seconds: float) -> Any:
    """Call a function in a process of its own and return what it returns.

    Args:
        function: Returns plain values. Its side effects remain in the new process.
        memory_bytes: Address space in addition to that of this process.
        seconds: Processor time.

    Raises:
        LimitExceeded: The function exceeded a limit.
        RuntimeError: The function raised an error; the message has its class and first line.
    """

    def work(connection: Connection) -> None:
        limit_seconds(seconds)
        try:
            connection.send(("result", function()))
        except Exception as error:
            if _lacks_memory(error):
                connection.send(("limit", f"it takes more than {memory_bytes >> 20} MiB of memory"))
            else:
                connection.send(("error", f"{type(error).__name__}: {first_line(error)}"))

    pid, connection = start(work, memory_bytes)
    try:
        kind, answer = receive(connection)
    except EOFError:
        limits = f"it has {memory_bytes >> 20} MiB of memory and {seconds:.0f} seconds"
        raise LimitExceeded(f"{end(pid, connection)}; {limits}") from None
    end(pid, connection)
    if kind == "limit":
        raise LimitExceeded(answer)
    if kind == "error":
        raise RuntimeError(answer)
    return answer


def _lacks_memory(error: BaseException | None) -> bool:
    """Tell whether a lack of memory caused an error; libraries raise errors of their own in place of MemoryError."""
    while error is not None:
        # a C function that gets no memory and sets no error raises SystemError; torch raises RuntimeError
        if isinstance(error, MemoryError | SystemError) or "can't allocate memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, shortened, or its class if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:400]
