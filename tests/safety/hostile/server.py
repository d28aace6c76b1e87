"""A process that has imported everything once and runs each request in a forked child with limits; run as a script.

A request is one line of JSON on standard input, the answer one line on standard output. Importing torch, lightning and
transformers takes seconds, a fork some milliseconds: so hundreds of hostile inputs can have a process each.
"""

import gc
import json
import os
import resource
import runpy
import select
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import accelerate

# what LightningCLI's commands import while they run is imported here too: a child would import it anew each time
import lightning
import psutil
import torch
import torch.nn.attention.flex_attention
import transformers
from jsonargparse._stubs_resolver import get_stubs_resolver
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import orthotrain.adapters
import orthotrain.cli.plan
import orthotrain.cli.trainer_cli
import orthotrain.distributed.consolidate
from orthotrain.cli.main import main

HERE = Path(__file__).parent
ENTRIES = runpy.run_path(str(HERE / "entries.py"))
WATCH = runpy.run_path(str(HERE / "watch.py"))["watch"]
GIB = 1 << 30
FULL = -1
"""In the place of a closed stream: standard output is a device without room."""


def address_space() -> int:
    """Return the limit in bytes: 3 GiB, or 1.5 GiB more than the imports map.

    A CPU build of torch maps 1.1 GiB; a CUDA build maps more than 3 GiB by itself.
    """
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    return max(3 * GIB, mapped + 3 * GIB // 2)


def limit(seconds: int) -> None:
    """Limit this process: address space, processor time, the size of a file it writes; no core dump."""
    limits = {"AS": address_space(), "CPU": seconds, "FSIZE": GIB, "CORE": 0}
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        resource.setrlimit(kind, (value, resource.getrlimit(kind)[1] if name != "CORE" else value))


def redirect(folder: Path, closed: list[int]) -> None:
    """Give this process files for its output; 1 or 2 in ``closed`` leaves that stream closed, as ``>&-`` does."""
    flags = os.O_CREAT | os.O_WRONLY | os.O_TRUNC
    for number, source in ((0, os.devnull), (1, folder / "stdout"), (2, folder / "stderr")):
        descriptor = os.open(source, flags if number else os.O_RDONLY)
        os.dup2(descriptor, number)
        os.close(descriptor)
    if FULL in closed:
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    for number in set(closed) - {FULL}:
        os.close(number)
        setattr(sys, {1: "stdout", 2: "stderr"}[number], None)


def run_here(request: dict) -> int:
    """Do what a request says in this process and return the exit code that Python would end with."""
    try:
        if "entry" in request:
            ENTRIES[request["entry"]](*request["arguments"])
        else:
            sys.argv = ["orthotrain", *request["arguments"]]
            main(request["arguments"])
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            code = 120  # as Python ends then
    return code


def child(request: dict) -> None:
    """Be the process of one request, and end."""
    folder = Path(request["folder"])
    os.setsid()
    home = os.environ["HOME"]
    for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME"):
        os.environ[name] = str(folder / "scratch")
    tempfile.tempdir = None
    os.chdir(folder / "work")
    sys.path.append(str(folder / "work"))  # as with PYTHONPATH=. or an installed package of that name
    for link, target in request["links"]:
        os.symlink(target, link.replace("{pid}", str(os.getpid())))
    log = os.dup2(os.open(folder / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND), 200)
    redirect(folder, request["closed"])
    limit(request["seconds"])
    WATCH(folder, home, log)
    os._exit(run_here(request) & 0xFF)


def serve(request: dict) -> dict:
    """Fork a child for a request, wait for it, end what it has left behind, and describe how it went."""
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        try:
            child(request)
        finally:
            os._exit(99)
    waiting = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(waiting, select.POLLIN)
    in_time = bool(poll.poll(1000 * request["seconds"]))
    for _ in range(100):
        try:
            os.killpg(pid, signal.SIGKILL)
            break
        except ProcessLookupError:  # it has not yet made its group, or all of it is gone
            if in_time:
                break
            time.sleep(0.01)
    _, status, usage = os.wait4(pid, 0)
    os.close(waiting)
    return {
        "code": os.waitstatus_to_exitcode(status),
        "in_time": in_time,
        "seconds": time.monotonic() - began,
        "kilobytes": usage.ru_maxrss,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert all((accelerate, lightning, psutil, transformers, orthotrain.cli.plan, torch.nn.attention.flex_attention))
    assert all((AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast))
    get_stubs_resolver()  # starts Python once to ask for its path: rows need not, and no row may start a program
    gc.collect()
    gc.freeze()  # no child looks through what the imports have made
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), flush=True)
