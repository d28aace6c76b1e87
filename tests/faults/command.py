"""One process that runs the command line of ``JOB``, with a fault built in; run as ``__main__``."""

import os
import signal
import sys
import traceback

JOB = JOB  # noqa: F821
os.environ.update(JOB["environment"])

import lightning as L  # noqa: E402
import torch  # noqa: E402

import orthotrain.checkpoint_io as checkpoint_io  # noqa: E402
from orthotrain.cli import main  # noqa: E402
from orthotrain.layers import PoetLinear  # noqa: E402
from orthotrain.modules import BaseModule, PoetModule  # noqa: E402


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Progress(L.Callback):
    """Writes every optimizer step and its loss to a file, and has the faults of certain steps."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if self._before != trainer.global_step:
            with open(f"{JOB['progress']}.{JOB['rank']}", "a") as file:
                file.write(f"{trainer.global_step}\n")

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self._before = trainer.global_step
        kind, step, rank = [*(JOB.get("fault") or [None, 0]), 0][:3]
        if trainer.global_step == step and JOB["rank"] == rank:
            if kind == "kill":
                die()
            if kind == "terminate":
                os.kill(os.getpid(), signal.SIGTERM)
            if kind == "remove":
                for path in JOB["remove"]:
                    os.rename(path, path + ".gone")
                die()


def install():
    original = PoetModule.configure_callbacks
    PoetModule.configure_callbacks = lambda self: [*original(self), Progress()]
    kind, number = (JOB.get("fault") or [None, 0])[:2]
    counts = {"saves": 0, "merges": 0}
    if kind == "save":

        def half_saved(checkpoint, file, save=torch.save):
            counts["saves"] += 1
            if counts["saves"] < number:
                return save(checkpoint, file)
            import io

            whole = io.BytesIO()
            save(checkpoint, whole)
            file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
            file.flush()
            die()

        checkpoint_io.torch = type("torch", (), {"save": staticmethod(half_saved)})
    if kind == "merge":

        def half_merged(self, merge=PoetLinear.merge_):
            counts["merges"] += 1
            if counts["merges"] == number:
                die()
            merge(self)

        PoetLinear.merge_ = half_merged
    if kind == "nan":
        plain = BaseModule.loss
        BaseModule.loss = lambda self, batch: plain(self, batch) * (float("nan") if self.global_step == number else 1.0)
    if kind == "limit":
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (number, number))


if __name__ == "__main__":
    if JOB["log"]:
        log = os.open(JOB["log"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
    sys.argv = ["orthotrain", *JOB["arguments"]]
    torch.set_num_threads(1)
    code = 0
    try:
        if "progress" in JOB:
            install()
        main(JOB["arguments"])
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)
