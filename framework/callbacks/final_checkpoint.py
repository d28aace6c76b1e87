"""The end of a run is saved: where it is told to end, and where it ends by itself."""

import signal
from functools import partial
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from orthotrain.callbacks.adapter_checkpoint import AdapterCheckpoint
from orthotrain.console.termination import NAMES, Ended, asked, check, hold, listen
from orthotrain.distributed.agreement import LateAgreement, least_of_ranks


class FinalCheckpoint(Checkpoint):
    """Save the last step of a run, whatever the period of its checkpoints is; on SIGTERM or Ctrl-C end the run.

    A run that has come to its end (``max_steps``, ``max_epochs``, ``max_time``, early stopping) saves its last step by
    the callbacks that save its checkpoints, unless they have; a run that has none saves nothing. Whatever saves a
    checkpoint, it says of the loops what they were after the last whole optimizer step: Lightning counts an epoch as
    finished in which ``max_steps`` was reached, and micro-batches whose gradients are in no checkpoint as done.

    A signal may reach any number of ranks, at different moments, and is noted only
    (:mod:`orthotrain.console.termination`). After each optimizer step, and after each batch of an evaluation, the ranks
    agree by one reduction of four bytes, save, and end. On devices the ranks read the result one step later, so that no
    step waits for it. Lightning's own handler communicates from inside the signal, in the middle of whatever collective
    is under way, and is replaced. The exit code is 128 and the signal's number (143, 130), as of a process that the
    signal ended. A second Ctrl-C ends the run at once.

    A validation that is cut short is left out when the run goes on; one between the micro-batches of an optimizer step
    is run to its end, since their gradients are in no checkpoint.

    A ``Checkpoint``, so that it runs after the callbacks that change the network (a merge).
    """

    def __init__(self) -> None:
        self._step_before = 0
        self._whole_step, self._in_training = True, False
        self._common_batches = 0
        self._loops: dict[str, Any] | None = None
        self._loops_step = -1
        self._agreement = LateAgreement()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Have the trainer note signals where it would set its own handlers."""
        self._loops, self._whole_step, self._in_training = None, True, False
        self._agreement = LateAgreement()
        connector: Any = trainer._signal_connector
        connector.register_signal_handlers = partial(_register, connector)
        # Lightning 2.6 (training_epoch_loop.py) has rank 0 tell the others before each batch whether its own handler,
        # which is replaced here, has been called, and each rank waits for its device to read the answer
        loop: Any = trainer.fit_loop.epoch_loop
        loop._broadcast_sigterm_tensor = _say_nothing
        check()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End here if asked: the network is built, and nothing is trained yet."""
        check()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the step, so that a micro-batch without an optimizer step is not mistaken for one."""
        self._step_before, self._in_training = trainer.global_step, True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and stop when an optimizer step has been taken and some rank has been told to end."""
        self._whole_step = trainer.global_step != self._step_before
        if self._whole_step:
            self._loops, self._loops_step = within_epoch(trainer.fit_loop.state_dict()), trainer.global_step
            self._end_if_asked(trainer, pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Say of the loops what they were after the last whole optimizer step."""
        if self._loops is not None and self._loops_step == trainer.global_step:
            checkpoint["loops"]["fit_loop"] = self._loops
        elif self._in_training:
            within_epoch(checkpoint["loops"]["fit_loop"])

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count the batches that every rank has: no rank may ask the others after its last."""
        self._count(trainer, trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count the batches that every rank has."""
        self._count(trainer, trainer.num_test_batches)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count the batches that every rank has."""
        self._count(trainer, trainer.num_predict_batches)

    def _count(self, trainer: L.Trainer, batches: list[int | float]) -> None:
        self._common_batches = least_of_ranks(int(min(sum(batches), 2**31 - 1)), trainer.strategy.root_device)

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kw: Any) -> None:
        """Save and stop in the middle of a validation, or of the check before training, where nothing is saved."""
        self._evaluated_a_batch(trainer, pl_module)

    def on_test_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kw: Any) -> None:
        """Stop in the middle of a test."""
        self._evaluated_a_batch(trainer, pl_module)

    def on_predict_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kw: Any) -> None:
        """Stop in the middle of a prediction."""
        self._evaluated_a_batch(trainer, pl_module)

    def _evaluated_a_batch(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._common_batches -= 1
        if self._whole_step and self._common_batches >= 0:
            self._end_if_asked(trainer, pl_module)

    def _end_if_asked(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._agreement.on_any_rank(bool(asked()), trainer.strategy.root_device):
            return
        signum = asked() or int(signal.SIGTERM)  # by another rank
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            raise Ended(signum)
        saved = save_end(trainer, pl_module)
        if saved:
            rank_zero_info(f"{NAMES[signum]}: step {trainer.global_step} is saved as {saved}")
        raise Ended(signum, message="" if saved else "interrupted; this run saves no checkpoints")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the last step; from here on the run may end at any moment."""
        save_end(trainer, pl_module)
        hold(False)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Take along the processes that this one has started, where it ends because it was told to."""
        hold(False)
        processes = getattr(trainer.strategy.launcher, "procs", [])
        if isinstance(exception, Ended):
            for process in processes:
                process.send_signal(signal.SIGTERM)
            processes.clear()  # Lightning's observer of them would kill this process for their exit codes

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let the run end at any moment."""
        hold(False)


def _say_nothing() -> None:
    pass


def _register(connector: Any) -> None:
    """Set a trainer's handlers, then note the signals that they are of; the trainer gives back what there was."""
    type(connector).register_signal_handlers(connector)
    listen()
    hold()


def within_epoch(loops: dict[str, Any]) -> dict[str, Any]:
    """Count the epoch, in place, as begun and not over, also in a run that was resumed at the end of an epoch.

    Lightning leaves out the beginning of such an epoch, and would take the next one for it.
    """
    for counts in loops["epoch_progress"].values():
        counts["ready"] = counts["started"] = counts["processed"] + 1
        counts["completed"] = counts["processed"]
    return loops


def save_end(trainer: L.Trainer, pl_module: L.LightningModule) -> str:
    """Let the callbacks that save checkpoints save the present step, unless they have.

    Returns:
        A file that holds the step; empty if the run saves none.
    """
    saved = [c.save_step(trainer, pl_module) for c in trainer.checkpoint_callbacks if isinstance(c, AdapterCheckpoint)]
    saving = [
        c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and (c.save_last or c.save_top_k)
    ]
    have = [c for c in saving if c._last_global_step_saved == trainer.global_step]
    for callback in [c for c in saving if c.save_last] or ([] if have else saving[:1]):
        if callback not in have:
            _save_step(callback, trainer)
            have.append(callback)
    saved += [callback._last_checkpoint_saved for callback in have]
    return saved[-1] if saved else ""


def _save_step(callback: ModelCheckpoint, trainer: L.Trainer) -> None:
    """Save the present step by the name that a callback gives its newest checkpoint.

    That is ``last.ckpt``, also where it links to another file or where the callback keeps the best ones only.
    """
    candidates = callback._monitor_candidates(trainer)
    if not callback.save_last and callback.monitor is None:
        callback._save_topk_checkpoint(trainer, candidates)
        return
    before, callback.save_last = callback.save_last, True
    try:
        callback._save_last_checkpoint(trainer, candidates)
    finally:
        callback.save_last = before
