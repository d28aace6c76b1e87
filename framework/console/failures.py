"""The known failures, each of which ends a command with one line (the failure and the remedy) and an exit code.

An error that :func:`explain` does not know is a bug of this package and keeps its traceback.
"""

import contextlib
import errno
import os
import re
import signal
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path

from orthotrain.console.streams import reader_is_gone
from orthotrain.errors import ConfigurationError, DeviceMemoryExhausted, TrainingDiverged

CHANGE_FIRST, START_AGAIN = 2, 1
"""Exit codes: the user has to change something first (the input, a full disk); the same command may be run again."""

WRITE_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE})
"""Error numbers of the file system that are clear without the name of the file."""

_WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: ([^.]*)|exited unexpect)")
_RUST = re.compile(r"\(os error (\d+)\)")
_TORCH_WRITER = re.compile(r"PytorchStreamWriter failed|inline_container\.cc|iostream error")
_OUT_OF_MEMORY = re.compile(
    r"CUDA(?:\])?(?: driver)?(?: error)?:? out of memory|CU(?:BLAS|DNN)_STATUS_ALLOC_FAILED"
    r"|DefaultCPUAllocator: (?:can't|not enough)"
)
_SILENT = re.compile(r"[Tt]imed out|[Tt]imeout|failed to pass monitoredBarrier")
_RANKS = re.compile(r"gloo/transport|monitoredBarrier|Connection (?:closed|reset) by peer|ncclRemoteError")
_AGAIN = "the checkpoints are intact: run the command again, fit with --ckpt_path last"


def explain(error: BaseException) -> tuple[str, int] | None:
    """Return the line and the exit code for an error; None for an error that needs its traceback.

    Args:
        error: The error that ended the command. Its causes are searched too, because the death of a data loader worker
            interrupts the program at any place, even during a write.
    """
    for link in _causes(error):
        if message := _killed_worker(link) or _lost_rank(link):
            return message, START_AGAIN
    if isinstance(error, ConfigurationError):
        return str(error), CHANGE_FIRST
    if isinstance(error, TrainingDiverged | DeviceMemoryExhausted):
        return str(error), START_AGAIN
    if is_out_of_memory(error):
        return (
            f"the memory of the device has run out ({asked_for(error)}): take --model.model.gradient_checkpointing "
            "true or --model.layers.activation_mode mem; a run that starts anew and an evaluation can also take a "
            f"lower --data.batch_size, or weights in int8 or nf4; {_AGAIN}"
        ), START_AGAIN
    if isinstance(error, RuntimeError) and str(error).startswith("Early stopping conditioned on metric"):
        return str(error), CHANGE_FIRST  # Lightning's message about a metric that the run does not log
    if isinstance(error, MemoryError):
        reason = str(error) or "the process is given no more"
        return f"memory has run out ({reason}); {_AGAIN} with more memory", START_AGAIN
    if is_panic(error):  # raised when a tokenizer decodes; an error of encoding names the tokenizer itself
        reason = (str(error).splitlines() or ["no message"])[0]
        return f"a tokenizer or another library in Rust has failed: {reason:.200}; take another tokenizer", CHANGE_FIRST
    if isinstance(error, BrokenPipeError) and reader_is_gone():
        return "standard output was closed before everything was written (`| head`): write it to a file", START_AGAIN
    message = _file_error(error)
    return None if message is None else (message, CHANGE_FIRST)


def _file_error(error: BaseException) -> str | None:
    """Return the line for an error of the file system, None for any other error."""
    if isinstance(error, FileNotFoundError):
        try:
            check_working_folder()
        except ConfigurationError as removed:
            return str(removed)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{str(error.filename)!r} cannot be read or written: {error.strerror}"
    number = _number(error)
    if number is None:
        return None
    return f"a file cannot be written: {os.strerror(number)}; make room, or name another --run_folder"


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Add the name of the file or folder that was written to an error of the file system.

    Python and the libraries that write files (safetensors, tokenizers, torch, matplotlib) often leave the name out.

    Args:
        path: The final place of the file or the folder.
    """
    try:
        yield
    except Exception as error:
        number = _number(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def quiet_threads() -> None:
    """Print no traceback of a thread for a known failure, because the main thread reports the same failure."""
    usual = threading.excepthook
    if getattr(usual, "__module__", None) == __name__:
        return

    def hook(raised: threading.ExceptHookArgs) -> None:
        if raised.exc_value is None or explain(raised.exc_value) is None:
            usual(raised)

    threading.excepthook = hook


def check_working_folder() -> None:
    """Refuse to work in a folder that was removed, where no relative path works.

    Raises:
        ConfigurationError: If the working folder was removed.
    """
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise ConfigurationError(
            "the working folder has been removed: change to a folder that exists, and start the command again"
        ) from error


def _causes(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether PyTorch or a CUDA library has asked for more memory than the device has."""
    # torch.OutOfMemoryError by its name: this module does not import torch
    return type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None
    )


def asked_for(error: BaseException) -> str:
    """Return PyTorch's sentence about the memory that has run out, without the details of its allocator."""
    return ". ".join(str(error).partition("\n")[0].split(". ")[:2])


def _killed_worker(error: BaseException) -> str | None:
    match = _WORKER.search(str(error)) if isinstance(error, RuntimeError) else None
    if match is not None:
        end = f"was killed ({_signal_name(match[2])})" if match[2] else "ended unexpectedly"
        failure = f"the data loader worker with process id {match[1]} {end}"
    elif _lost_connection_to_worker(error):
        failure = "a data loader worker ended unexpectedly while it sent a batch"
    else:
        return None
    return (
        f"{failure}; most often memory has run out: lower --data.num_workers or --data.batch_size, or give the machine "
        f"more memory; {_AGAIN}"
    )


def _lost_connection_to_worker(error: BaseException) -> bool:
    """Tell whether the connection to a data loader worker broke, before torch has noticed that the worker ended.

    An error that a worker itself raises has another form.
    """
    if not isinstance(error, ConnectionError | EOFError | FileNotFoundError):
        return False
    frames = traceback.walk_tb(error.__traceback__)
    return "in pin memory thread" in str(error) or any(f.f_code.co_name == "_try_get_data" for f, _ in frames)


def _signal_name(description: str) -> str:
    """Return the name of a signal, such as SIGKILL, from the description of the C library."""
    known = {signal.strsignal(number): number.name for number in signal.Signals}
    return known.get(description.strip(), description.strip())


def _lost_rank(error: BaseException) -> str | None:
    # torch has classes for the errors of its stores and of NCCL; only the text tells an error of gloo
    kind, silent = type(error).__name__, _SILENT.search(str(error))
    ranks = kind in ("DistNetworkError", "DistStoreError") or _RANKS.search(str(error))
    if not isinstance(error, RuntimeError) or not (ranks or (kind == "DistBackendError" and silent)):
        return None
    if silent:
        return (
            "another rank has not answered within the time limit (its process has stopped, or its host is down); "
            f"{_AGAIN}; --trainer.strategy.init_args.timeout HH:MM:SS sets another limit"
        )
    return f"the connection to another rank is lost: that rank has ended, and its last line says why; {_AGAIN}"


def is_panic(error: BaseException) -> bool:
    """Tell whether an error is a panic of a Rust library, whose class cannot be imported."""
    return type(error).__name__ == "PanicException"


def _number(error: BaseException) -> int | None:
    """Return the error number of the file system that caused an exception; None if there is none."""
    link: BaseException | None = error
    while isinstance(link, Exception):
        if isinstance(link, OSError) and link.errno in WRITE_ERRORS:
            return link.errno
        if (match := _RUST.search(str(link))) and int(match[1]) in WRITE_ERRORS:
            return int(match[1])
        if not _TORCH_WRITER.search(str(link)):
            return None
        # torch's writer reports a failed write without the reason, which is in the context if Python wrote the file
        if link.__cause__ is None and link.__context__ is None:
            return errno.EIO
        link = link.__cause__ or link.__context__
    return None
