"""What ends a command in one line, and what keeps its traceback."""

import contextlib
import errno
import json
import os
import resource
import runpy
import signal
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import Replace
from torch.utils.data import DataLoader

from orthotrain.cli import main as cli
from orthotrain.console.failures import explain, naming, quiet_threads
from orthotrain.errors import ConfigurationError, TrainingDiverged

FAULTS = Path(__file__).parents[2] / "faults"
RANKS = runpy.run_path(str(FAULTS / "ranks.py"))


class Dies(torch.utils.data.Dataset):
    """Its second sample takes the worker with it."""

    def __init__(self, how):
        self.how = how

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 1:
            os.kill(os.getpid(), signal.SIGKILL) if self.how == "killed" else os._exit(3)
        return index


def caught(act):
    with pytest.raises(Exception) as info:
        act()
    return info.value


@pytest.mark.parametrize("how", ["killed", "ends"])
def test_a_data_loader_worker(how):
    error = caught(lambda: list(DataLoader(Dies(how), num_workers=1)))
    line, code = explain(error)
    assert code == 1 and "the data loader worker with process id " in line and "--data.num_workers" in line
    interrupted = ConfigurationError("checkpoint 'x' cannot be written")  # it interrupts the program anywhere
    interrupted.__cause__ = error
    assert explain(interrupted) == (line, code)


@pytest.mark.parametrize("kind", [ConnectionResetError, FileNotFoundError, EOFError])
def test_a_worker_that_ends_while_it_hands_over_a_batch(kind, monkeypatch):
    """The tensors of a batch are fetched from the worker, which is not there any longer."""

    def get(self, timeout):
        raise kind(errno.ECONNRESET, "Connection reset by peer")

    loader = iter(DataLoader([1, 2, 3], num_workers=1))
    monkeypatch.setattr(type(loader._data_queue), "get", get)
    line, code = explain(caught(lambda: next(loader)))
    assert code == 1 and "a data loader worker ended unexpectedly while it sent a batch" in line
    own = kind(errno.ENOENT, "No such file or directory")  # raised by a worker, or elsewhere
    assert "data loader worker" not in str(explain(own))


SILENT = [
    RuntimeError(
        "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 5000ms for recv"
    ),
    RuntimeError("[Rank 0]: Ranks 1 failed to pass monitoredBarrier in 5000 ms"),
    torch.distributed.DistStoreError("wait timeout after 5000ms, keys: /default_pg/0//0"),
    torch.distributed.DistStoreError("Timed out after 7 seconds waiting for clients. 1/2 clients joined."),
    torch.distributed.DistNetworkError("The client socket has timed out after 5000ms while trying to connect"),
    torch.distributed.DistBackendError("NCCL communicator was aborted on rank 0: collective operation timeout"),
]
GONE = [
    RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:4"),
    torch.distributed.DistNetworkError("failed to recv, got 0 bytes"),
    torch.distributed.DistBackendError("NCCL error: ncclRemoteError: a remote process exited"),
]


@pytest.mark.parametrize("error", [*SILENT, *GONE], ids=lambda error: str(error)[-24:])
def test_another_rank(error):
    line, code = explain(error)
    assert code == 1
    assert ("has not answered within the time limit" in line) == (error in SILENT)
    assert ("that rank has ended" in line) == (error in GONE)


FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
]


@pytest.mark.parametrize("error", FULL, ids=lambda error: str(error)[:24])
def test_a_device_without_memory(error):
    line, code = explain(error)
    assert code == 1 and line.startswith("the memory of the device has run out (")
    assert "GPU 0 has" not in line and "--data.batch_size" in line and "--ckpt_path last" in line


def with_cause(error, cause):
    error.__cause__ = cause
    return error


FAULTS_OF_THE_PROGRAM = [
    KeyError("layers"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("the operation timed out"),
    torch.distributed.DistBackendError("NCCL error: invalid usage, Duplicate GPU detected"),
    OSError(errno.EBADF, "Bad file descriptor"),
    with_cause(TypeError("while a full disk was handled"), OSError(errno.ENOSPC, "No space left on device")),
    Exception("(os error 2)"),
]


@pytest.mark.parametrize("error", FAULTS_OF_THE_PROGRAM, ids=str)
def test_a_fault_of_the_program_keeps_its_traceback(error, monkeypatch):
    assert explain(error) is None

    def run(arguments):
        raise error

    monkeypatch.setattr(cli, "run_trainer", run)
    with pytest.raises(type(error)):
        cli.main(["fit"])


def test_input_and_divergence():
    assert explain(ConfigurationError("a")) == ("a", 2)
    assert explain(TrainingDiverged("b")) == ("b", 1)


def test_a_panic_of_a_library_is_one_line(monkeypatch, capsys):
    # a real one: the pattern backtracks more often than its library allows
    normalizer = Replace(Regex(r"(\w+\s?)+#"), "x")

    monkeypatch.setattr(cli, "run_trainer", lambda arguments: normalizer.normalize_str("a" * 60 + "!#"))
    with pytest.raises(SystemExit) as stop:
        cli.main(["fit"])
    *_, line = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and line.startswith(
        "orthotrain: error: a tokenizer or another library in Rust has failed:"
    )


@contextlib.contextmanager
def small_files(size=10):
    """Let every write of this process fail behind the first bytes of a file, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def torch_to_a_file(path):
    with path.open("wb", buffering=0) as file:
        torch.save({"w": torch.ones(9)}, file)


WRITERS = {
    "python": lambda path: path.write_bytes(b"x" * 100),
    "torch": lambda path: torch.save({"w": torch.ones(9)}, path),
    "torch to a file": torch_to_a_file,
    "safetensors": lambda path: save_file({"w": torch.ones(9)}, path),
    "tokenizers": lambda path: Tokenizer(BPE()).save(str(path)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_write_that_fails_is_named(name, tmp_path):
    def write():
        with small_files(), naming("model"):
            WRITERS[name](tmp_path / "file")

    assert explain(caught(write))[0].startswith("'model' cannot be read or written: ")

    def write_unnamed():
        with small_files():
            WRITERS[name](tmp_path / "file")

    line, code = explain(caught(write_unnamed))
    assert code == 2 and line.startswith("a file cannot be written: ") and "make room" in line


def test_a_thread_leaves_a_known_failure_to_the_main_thread(capsys, monkeypatch):
    printed = []
    monkeypatch.setattr(threading, "excepthook", lambda told: printed.append(told.exc_value))
    quiet_threads()
    quiet_threads()

    def fail(error):
        raise error

    unknown = KeyError("unknown")
    for error in (OSError(errno.ENOSPC, "No space left on device"), unknown):
        thread = threading.Thread(target=fail, args=(error,))
        thread.start()
        thread.join()
    assert printed == [unknown]


def test_the_working_folder_was_removed(tmp_path, monkeypatch, capsys):
    """Before the command, and while it runs."""

    def remove(arguments):
        (tmp_path / "during").rmdir()
        Path("relative").resolve()

    monkeypatch.setattr(cli, "run_trainer", remove)
    for name in ("before", "during"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        if name == "before":
            (tmp_path / name).rmdir()
        with pytest.raises(SystemExit) as stop:
            cli.main(["fit"])
        assert stop.value.code == 2
        assert "error: the working folder has been removed: change to" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)


TENSORBOARD = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"name": "", "version": ""}}
REPORT = {"class_path": "RunReport", "init_args": {"sample_tokens": 4}}
FULL = {
    "metrics.csv": (None, [], ["full", 2]),
    "events": ("tensorboard", [], ["full", 2]),
    "summary.json": ("false", [REPORT], ["full", 2]),
}


@pytest.mark.parametrize("name", FULL)
def test_what_a_run_writes_beside_its_checkpoints(name, small_config, tmp_path):
    logger, callbacks, fault = FULL[name]
    run = tmp_path / "run"
    logs = json.dumps([TENSORBOARD | {"init_args": {**TENSORBOARD["init_args"], "save_dir": str(run)}}])
    arguments = ["fit", "-c", "pretrain/poet_quickstart.yaml", "-c", str(small_config), "-c", "trainer/cpu.yaml"]
    arguments += ["--trainer.callbacks", json.dumps(callbacks), "--trainer.enable_checkpointing", "false"]
    arguments += [] if logger is None else ["--trainer.logger", logs if logger == "tensorboard" else logger]
    job = {"arguments": arguments, "fault": fault, "progress": str(tmp_path / "progress")}
    os.mkfifo(tmp_path / "log.0")  # the limit on the size of files would cut a log file, but not a pipe
    pipe = os.open(tmp_path / "log.0", os.O_RDONLY | os.O_NONBLOCK)
    codes = RANKS["wait"](RANKS["start"](FAULTS / "command.py", job, log=tmp_path / "log"), 120)
    log = os.read(pipe, 1 << 16).decode()
    os.close(pipe)
    assert codes == [2] and "Traceback" not in log and "Exception ignored" not in log, log
    (line,) = [line for line in log.splitlines() if line.startswith("orthotrain: error: ")]
    assert "File too large" in line
    if name == "summary.json":
        assert f"'{run / name}'" in line and not (run / name).exists()
    assert not [path.name for path in run.rglob("*") if path.name.startswith(".")]
