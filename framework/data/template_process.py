"""Rendering chat templates, which are programs of a file's author, in a process of bounded memory and time."""

import contextlib
import gc
import os
import resource
import signal
import warnings
import weakref
from collections.abc import Sequence
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

MEMORY_BYTES = 512 << 20
"""Memory of the process beyond what it has of its parent."""
SECONDS, SECONDS_PER_ROW, SECONDS_PER_CHARACTER = 20.0, 0.01, 2e-6
"""Processor time of the process: a start, and a share for each row and character, both a hundred times the usual."""
MOST_CHARACTERS = 16 << 20
"""Longest text that a template may write."""
_ANSWER_SECONDS = 600

Request = tuple[list[dict[str, str]], bool]
"""A conversation, and whether the text ends with the beginning of an answer."""


class TemplateError(Exception):
    """A template that refuses a conversation, or goes beyond a limit: one line."""


class TemplateProcess:
    """Renders conversations by a tokenizer's chat template, in a forked process that its limits can end.

    A template may loop for ever or double a string until no memory is left, and the sandbox of transformers limits
    neither. The process is started at the first call, does no more than rendering, and ends with this object.

    Args:
        tokenizer: Whose chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._child: tuple[int, Connection] | None = None
        self._seconds = SECONDS

    def __call__(self, requests: Sequence[Request]) -> list[str]:
        """Render the conversations of a row.

        Raises:
            TemplateError: The template refuses one of them, or goes beyond a limit.
        """
        if self._child is None:
            self._child = _start(self._tokenizer)
            self._stop = weakref.finalize(self, _end, *self._child)
        pid, connection = self._child
        characters = sum(len(message["content"]) for messages, _ in requests for message in messages)
        self._seconds += SECONDS_PER_ROW + SECONDS_PER_CHARACTER * characters
        try:
            connection.send((list(requests), self._seconds))
            if not connection.poll(_ANSWER_SECONDS):
                raise EOFError
            fine, answer = connection.recv()
        except (EOFError, OSError):
            self._stop.detach()
            self._child = None
            raise TemplateError(_cause_of_death(_end(pid, connection), self._seconds)) from None
        if not fine:
            raise TemplateError(answer)
        return answer


def _start(tokenizer: Any) -> tuple[int, Connection]:
    ours, theirs = Pipe()
    with warnings.catch_warnings():  # Python warns of threads; the process takes none of their locks
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        theirs.close()
        return pid, ours
    try:
        ours.close()
        _prepare()
        _serve(theirs, tokenizer)
    finally:
        os._exit(1)


def _prepare() -> None:
    """Leave the parent's objects and signals alone, and set the limits that stay."""
    gc.freeze()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the parent ends, and this process with it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    _lower(resource.RLIMIT_CORE, 0)
    if (sizes := Path("/proc/self/statm")).exists():
        _lower(resource.RLIMIT_AS, int(sizes.read_text().split()[0]) * resource.getpagesize() + MEMORY_BYTES)


def _lower(limit: int, value: int) -> None:
    """Set a soft limit, unless it is lower already."""
    soft, hard = resource.getrlimit(limit)
    known = [number for number in (value, soft, hard) if number != resource.RLIM_INFINITY]
    resource.setrlimit(limit, (min(known), hard))


def _serve(connection: Connection, tokenizer: Any) -> None:
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    while True:
        requests, seconds = connection.recv()
        if hard == resource.RLIM_INFINITY or seconds < hard:
            resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, hard))
        try:
            answer = True, [_render(tokenizer, *request) for request in requests]
        except MemoryError:
            answer = False, f"it needs more than {MEMORY_BYTES >> 20} MiB of memory"
        except Exception as error:  # templates are programs: they raise jinja2's and their own errors
            answer = False, (str(error).splitlines() or [type(error).__name__])[0][:300]
        connection.send(answer)


def _render(tokenizer: Any, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"it writes {len(text):,} characters, the most are {MOST_CHARACTERS:,}")
    return text


def _end(pid: int, connection: Connection) -> int:
    """Close the connection, end the process and return its wait status."""
    connection.close()
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        finished, status = os.waitpid(pid, os.WNOHANG)
        if finished:
            return status
        os.kill(pid, signal.SIGKILL)
        return os.waitpid(pid, 0)[1]
    return 0


def _cause_of_death(status: int, seconds: float) -> str:
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
        return f"it computes for more than {seconds:.0f} seconds"
    return f"its process ended without an answer (status {status})"
