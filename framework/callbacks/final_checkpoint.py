"""Saving the last step of a run that ends by itself, or that a signal ends."""

import signal
from functools import partial
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from orthotrain.callbacks.adapter_checkpoint import AdapterCheckpoint
from orthotrain.callbacks.run_progress import evaluated_batches
from orthotrain.callbacks.step_callback import StepCallback
from orthotrain.console.termination import NAMES, Ended, asked, check, hold, listen
from orthotrain.distributed.agreement import LateAgreement, least_of_ranks


class FinalCheckpoint(StepCallback, Checkpoint):
    """Save the last step of a run, whatever the period of its checkpoints is; on SIGTERM or Ctrl-C end the run.

    When a run ends by itself (``max_steps``, ``max_epochs``, ``max_time``, early stopping), the callbacks that save its
    checkpoints save the last step, unless they have saved it already. A run without such a callback saves nothing.
    Every checkpoint stores the state of the loops after the last whole optimizer step. Lightning's own state would
    count an epoch as finished if ``max_steps`` was reached in it, and micro-batches as done although no checkpoint
    holds their gradients.

    A signal may reach any number of ranks, at different moments. Its handler only notes the signal
    (:mod:`orthotrain.console.termination`). After each optimizer step, and after each batch of an evaluation, the ranks
    agree by one reduction of four bytes, save, and end. On devices the ranks read the result one step later, so that no
    step waits for the result. Lightning's handler is replaced: it communicates from inside the signal, possibly in the
    middle of another collective. The exit code is 128 plus the signal's number (143, 130), as if the signal had ended
    the process. A second Ctrl-C ends the run at once.

    A validation that a signal cuts short is not repeated when the run resumes. A validation between the micro-batches
    of an optimizer step is run to its end, since no checkpoint holds their gradients.

    The class is a ``Checkpoint`` so that Lightning runs it after the callbacks that change the network (a merge).
    """

    def __init__(self) -> None:
        self._whole_step, self._in_training = True, False
        self._common_batches = 0
        self._loops: dict[str, Any] | None = None
        self._loops_step = -1
        self._agreement = LateAgreement()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let the trainer note signals instead of setting its own handlers."""
        self._loops, self._whole_step, self._in_training = None, True, False
        self._agreement = LateAgreement()
        connector: Any = trainer._signal_connector
        connector.register_signal_handlers = partial(_register, connector)
        # In Lightning 2.6 (training_epoch_loop.py) rank 0 broadcasts before each batch whether Lightning's handler was
        # called, and each rank waits for its device to read the answer. The handler is replaced here.
        loop: Any = trainer.fit_loop.epoch_loop
        loop._broadcast_sigterm_tensor = _do_nothing
        check()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End here if a signal asks for it: the network is built, and nothing is trained yet."""
        check()

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kw: Any) -> None:
        """Note that an optimizer step has begun."""
        super().on_train_batch_start(trainer, pl_module)
        self._whole_step, self._in_training = False, True

    def on_step_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the state of the loops; save and stop if a signal has reached some rank."""
        self._whole_step = True
        self._loops, self._loops_step = within_epoch(trainer.fit_loop.state_dict()), trainer.global_step
        self._end_if_asked(trainer, pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the state that the loops had after the last whole optimizer step."""
        if self._loops is not None and self._loops_step == trainer.global_step:
            checkpoint["loops"]["fit_loop"] = self._loops
        elif self._in_training:
            within_epoch(checkpoint["loops"]["fit_loop"])

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count the batches that every rank has: a rank must not wait for the others after its last batch."""
        _, own = evaluated_batches(trainer)
        self._common_batches = least_of_ranks(int(min(own, 2**31 - 1)), trainer.strategy.root_device)

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kw: Any) -> None:
        """Stop within an evaluation; within a validation of a run that trains, save first."""
        self._common_batches -= 1
        if self._whole_step and self._common_batches >= 0:
            self._end_if_asked(trainer, pl_module)

    on_test_start = on_predict_start = on_validation_start
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def _end_if_asked(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._agreement.on_any_rank(bool(asked()), trainer.strategy.root_device):
            return
        signum = asked() or int(signal.SIGTERM)  # another rank was asked
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            raise Ended(signum)
        saved = save_end(trainer, pl_module)
        if saved:
            rank_zero_info(f"{NAMES[signum]}: step {trainer.global_step} is saved as {saved}")
        raise Ended(signum, message="" if saved else "interrupted; this run saves no checkpoints")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the last step; after this the run may end at any moment."""
        save_end(trainer, pl_module)
        hold(False)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """If a signal ends this process, end the processes that it has started too."""
        hold(False)
        processes = getattr(trainer.strategy.launcher, "procs", [])
        if isinstance(exception, Ended):
            for process in processes:
                process.send_signal(signal.SIGTERM)
            processes.clear()  # Lightning watches them, and would kill this process for their exit codes

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let the run end at any moment."""
        hold(False)


def _do_nothing() -> None:
    pass


def _register(connector: Any) -> None:
    """Set a trainer's handlers, then replace them by handlers that note signals; the trainer restores the old ones."""
    type(connector).register_signal_handlers(connector)
    listen()
    hold()


def within_epoch(loops: dict[str, Any]) -> dict[str, Any]:
    """Mark the epoch, in place, as begun and not finished, also in a run that was resumed at the end of an epoch.

    Lightning does not count the beginning of such an epoch, and would continue with the next epoch instead.
    """
    for counts in loops["epoch_progress"].values():
        counts["ready"] = counts["started"] = counts["processed"] + 1
        counts["completed"] = counts["processed"]
    return loops


def save_end(trainer: L.Trainer, pl_module: L.LightningModule) -> str:
    """Let the callbacks that save checkpoints save the current step, unless they have saved it already.

    Returns:
        A file that holds the step; empty if the run saves no checkpoints.
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
    """Save the current step under the name that a callback gives to its newest checkpoint.

    This is ``last.ckpt``, also if ``last.ckpt`` is a link, or if the callback keeps the best checkpoints alone.
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
