"""Faults that are built into a process of a run, and the record of its steps.

A fault is ``[kind, number, rank]``: its kind, the step, batch or call at which it happens, and the rank (default 0).
"""

import multiprocessing
import os
import resource
import shutil
import signal
from pathlib import Path

import lightning as L
from torch.distributed.checkpoint.filesystem import _FileSystemWriter

import orthotrain.callbacks.adapter_checkpoint as adapter_checkpoint
import orthotrain.checkpoints.shards as sharded_checkpoint
import orthotrain.checkpoints.writing as checkpoint_io
import orthotrain.files.atomic_writes as temporary
from orthotrain.layers import PoetLinear, StepwiseLinear
from orthotrain.modules import OftModule, PoetModule


def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)


def cut(*paths):
    for path in paths:
        os.truncate(path, os.path.getsize(path) // 2)


class Progress(L.Callback):
    """Writes every optimizer step to a file, and injects the faults of certain steps and batches."""

    def __init__(self, job):
        self.job = job
        self.kind, self.number, self.rank = [*(job.get("fault") or [None, 0]), 0][:3]
        self.batches = 0

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if self._before != trainer.global_step:
            with open(f"{self.job['progress']}.{self.job['rank']}", "a") as file:
                file.write(f"{trainer.global_step}\n")

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self._before = trainer.global_step
        self.batches += 1
        if self.job["rank"] != self.rank:
            return
        if self.kind == "nan" and self.batches == self.number:
            poison(module.model.get_input_embeddings())
        if trainer.global_step != self.number:
            return
        if self.kind == "kill":
            die()
        if self.kind == "stop":
            self.kind = None  # an accumulated step has several batches
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.kind == "full":
            limit_files(256)
        if self.kind == "worker":
            kill_a_worker()
        if self.kind == "terminate":
            os.kill(os.getpid(), signal.SIGTERM)
        if self.kind == "vanish":
            for path in self.job["vanish"]:
                os.rename(path, path + ".gone")
            die()

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
        here = self.kind == "validating worker" and self.job["rank"] == self.rank
        if here and trainer.global_step >= self.number:
            kill_a_worker()


def limit_files(size):
    """Limit the size of files. Python ignores SIGXFSZ, so a write beyond it is an error (EFBIG), as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def kill_a_worker():
    """Kill a process that prepares batches, as a machine without free memory does."""
    multiprocessing.active_children()[-1].kill()


def poison(embedding):
    """Let the network see NaN for one token of the next batch: in its embedding, since ids cannot be NaN."""

    def spoil(layer, ids, embedded):
        hook.remove()
        spoilt = embedded.clone()
        spoilt[0, 1] = float("nan")
        return spoilt

    hook = embedding.register_forward_hook(spoil)


def at_call(owner, name, number, act, counts=lambda *arguments, **options: True):
    """Replace a function: its ``number``-th call that counts becomes ``act(original, *arguments)``."""
    original, calls = getattr(owner, name), [0]

    def counted(*arguments, **options):
        calls[0] += bool(counts(*arguments, **options))
        if calls[0] == number:
            return act(original, *arguments, **options)
        return original(*arguments, **options)

    setattr(owner, name, counted)


def half_written(original, path, write):
    """A file is cut off before it gets its name."""

    def half(file):
        write(file)
        file.flush()
        cut(file.name)
        die()

    original(path, half)


def half_weights(original, tensors, path, **options):
    original(tensors, path, **options)
    cut(path)
    die()


def half_shard(rank):
    def write(original, writer, *arguments):
        original(writer, *arguments).wait()
        cut(*Path(writer.path).glob(f"__{rank}_*"))
        die()

    return write


def half_removed(original, path, **options):
    os.unlink(sorted(Path(path).iterdir())[0])
    die()


def between_renames(original, source, target):
    original(source, target)
    die()


def inject(job):
    """Let the process record its steps and inject the fault of its job."""
    for module in (PoetModule, OftModule):
        original = module.configure_callbacks
        module.configure_callbacks = lambda self, original=original: [*original(self), Progress(job)]
    kind, number, rank = [*(job.get("fault") or [None, 0]), 0][:3]
    if job["rank"] != rank:
        return
    if kind == "limit":
        limit_files(number)
    calls = {
        "merge": [(PoetLinear, "merge_", die), (StepwiseLinear, "fold_", die)],
        "save": [(checkpoint_io, "write_atomically", half_written)],
        "weights": [(adapter_checkpoint, "save_file", half_weights)],
        "shard": [(_FileSystemWriter, "write_data", half_shard(rank))],
        "sums": [(sharded_checkpoint, "_write_sums", die)],
        "publish": [(module, "publish", die) for module in (adapter_checkpoint, sharded_checkpoint)],
        "rename": [(os, "replace", between_renames, lambda a, b: str(b).endswith(temporary.OLD_SUFFIX))],
        "drop": [(shutil, "rmtree", half_removed, lambda path, **options: os.path.isdir(path))],
    }
    for owner, name, act, *counts in calls.get(kind, []):
        at_call(owner, name, number, act, *counts)
