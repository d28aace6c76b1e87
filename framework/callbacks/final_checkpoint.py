"""A checkpoint when the run is told to end."""

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from orthotrain.callbacks.adapter_checkpoint import AdapterCheckpoint
from orthotrain.callbacks.agreement import least_of_ranks, on_any_rank

NAMES = {int(signal.SIGTERM): "SIGTERM", int(signal.SIGINT): "Ctrl-C"}


class FinalCheckpoint(Checkpoint):
    """On SIGTERM or Ctrl-C, finish the optimizer step under way, write ``last.ckpt`` and end the run.

    The signal may reach any number of ranks, at different moments: after each optimizer step, and after each batch of a
    validation, the ranks agree by one reduction of four bytes. Lightning's own handler communicates from inside the
    signal, in the middle of whatever collective is under way, and is replaced while training runs. The file lies where
    the run's checkpoints lie; a run that saves none writes none. The exit code is 128 and the signal's number (143,
    130), as of a process that the signal ended. A second Ctrl-C ends the run at once.

    A validation that is cut short is left out when the run goes on; one between the micro-batches of an optimizer step
    is run to its end, since their gradients are in no checkpoint.

    A ``Checkpoint``, so that it runs after the callbacks that change the network (a merge).
    """

    def __init__(self) -> None:
        self._asked = 0
        self._step_before = 0
        self._whole_step = True
        self._common_batches = 0

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take over the signals."""
        self._take_over(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take over the signals."""
        self._take_over(trainer)

    def _take_over(self, trainer: L.Trainer) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        if trainer.received_sigterm:  # by Lightning's handler, before this one
            self._asked = int(signal.SIGTERM)

        def note(signum: int, frame: FrameType | None) -> None:
            launcher: Any = trainer.strategy.launcher
            if signum == signal.SIGINT:  # a terminal sends it to all the processes of the run
                signal.signal(signal.SIGINT, signal.default_int_handler)
                if trainer.is_global_zero:  # not print: the signal may have interrupted one
                    os.write(2, b"\nCtrl-C: ending after this step; again to end at once\n")
            elif not self._asked and hasattr(launcher, "kill"):  # the processes that this one has started
                launcher.kill(signum)
            self._asked = self._asked or signum

        # nothing gives them back here: Lightning does when the run ends, before `on_fit_end` and `teardown`
        signal.signal(signal.SIGTERM, note)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, note)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the step, so that a micro-batch without an optimizer step is not mistaken for one."""
        self._step_before = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and stop when an optimizer step has been taken and some rank has been told to end."""
        self._whole_step = trainer.global_step != self._step_before
        if self._whole_step:
            self._end_if_asked(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count the batches that every rank has: no rank may ask the others after its last."""
        if trainer.state.fn == "fit":
            mine = sum(trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches)
            self._common_batches = least_of_ranks(int(min(mine, 2**31 - 1)), trainer.strategy.root_device)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Save and stop in the middle of a validation, or of the check before training, where nothing is saved."""
        self._common_batches -= 1
        if trainer.state.fn == "fit" and self._whole_step and self._common_batches >= 0:
            self._end_if_asked(trainer)

    def _end_if_asked(self, trainer: L.Trainer) -> None:
        if not on_any_rank(bool(self._asked), trainer.strategy.root_device):
            return
        asked = self._asked or int(signal.SIGTERM)  # by another rank
        folder = None if trainer.sanity_checking else checkpoint_folder(trainer)
        if folder is not None:
            trainer.save_checkpoint(folder / "last.ckpt")
            rank_zero_info(f"{NAMES[asked]}: step {trainer.global_step} is saved as {folder / 'last.ckpt'}")
        raise SIGTERMException(128 + asked)


def checkpoint_folder(trainer: L.Trainer) -> Path | None:
    """Return the folder of the first callback that saves checkpoints, the same on all ranks; None if none does."""
    for callback in trainer.checkpoint_callbacks:
        path = getattr(callback, "dirpath", None)
        if path is not None:
            return Path(trainer.strategy.broadcast(path))
        if isinstance(callback, AdapterCheckpoint):
            return Path(trainer.strategy.broadcast(trainer.log_dir or ".")) / "adapters"
    return None
