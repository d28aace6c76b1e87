"""The part of a module that reads and writes checkpoints: rebuilding it from one, and resuming a run."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from orthotrain.callbacks.adapter_checkpoint import restore_frozen
from orthotrain.callbacks.finite_guard import FiniteGuard
from orthotrain.callbacks.merge_rotations import MergeRotations
from orthotrain.checkpoints.reading import check_finite, compare_state, read_checkpoint
from orthotrain.checkpoints.rebuild import rebuild_module
from orthotrain.checkpoints.restore_checks import check_merges, check_optimizers, check_progress
from orthotrain.checkpoints.resume import adapt_ranks, begin_next_epoch, forget_end_of_epoch
from orthotrain.checkpoints.run_folder import checkpoint_folder_of
from orthotrain.checkpoints.stored_paths import keep_own_paths
from orthotrain.distributed.agreement import agree_on_step
from orthotrain.errors import ConfigurationError


class ResumableModule(L.LightningModule):
    """A LightningModule that checks its checkpoints when it writes and reads them.

    Attributes:
        resume_from: The checkpoint from which the command line resumes; ranks compare it before they read it.
    """

    resume_from: str | None = None
    _epoch_was_over = False
    _restored: dict[str, Any] | None = None  # the checkpoint, until the optimizers exist and can be compared with it

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path,
        map_location: str | torch.device | None = None,
        strict: bool = True,
        allow: Iterable[str | type] = (),
        trust_remote_code: bool = False,
        **given: Any,
    ) -> Self:
        """Rebuild a module with its weights from a checkpoint; no code from the file is run.

        ``PoetModule.load_from_checkpoint("last.ckpt")`` is enough for a checkpoint of ``orthotrain fit``. A checkpoint
        of your own program does not say how the network is built: give the same ``model=`` and ``layers=`` again.

        Args:
            checkpoint_path: The ``.ckpt`` file.
            map_location: Device of the module; None for the CPU.
            strict: Whether the file and the module must have the same tensors.
            allow: Classes of your own, or their dotted names, that the file may name.
            trust_remote_code: Whether code that comes with a pretrained model is run if the run has done so.
            given: Arguments of the module in place of the stored ones.

        Raises:
            ConfigurationError: If the file cannot be read, does not describe its module, names unknown code, or does
                not fit.
        """
        for name in ("weights_only", "hparams_file"):
            if given.pop(name, None):
                raise ConfigurationError(f"load_from_checkpoint({name}=...): the file decides this; leave {name} out")
        contents = read_checkpoint(checkpoint_path)
        module = rebuild_module(contents, cls, str(checkpoint_path), allow, trust_remote_code, given, strict)
        return module if map_location is None else module.to(map_location)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Let callbacks check the numbers before the weights are written without the rest of a checkpoint.

        Lightning calls ``on_save_checkpoint`` of its callbacks for full checkpoints only.

        Raises:
            TrainingDiverged: If a number is not finite.
        """
        if self._trainer is None or "callbacks" in checkpoint:
            return
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, FiniteGuard | MergeRotations):
                callback.on_save_checkpoint(self.trainer, self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Fit the checkpoint to this run: its paths, the number of ranks, and the frozen weights of an adapter.

        Raises:
            ConfigurationError: If the checkpoint is of another model, holds values that are not finite, or cannot be
                restored in this run, naming the entry.
        """
        if self._trainer is not None:
            self._fit_to_run(checkpoint)
            self._epoch_was_over = forget_end_of_epoch(checkpoint)
        if "state_dict" not in checkpoint:  # ModelParallelStrategy has loaded the network already
            return
        restore_frozen(checkpoint, self)
        difference = compare_state(checkpoint["state_dict"], self.state_dict())
        if difference:
            raise ConfigurationError(
                f"the checkpoint is of another model: {difference}; use the config it was made with"
            )
        check_merges(checkpoint["state_dict"], checkpoint.get("global_step"))
        check_finite(checkpoint["state_dict"], [name for name, _ in self.named_parameters(remove_duplicate=False)])

    def _fit_to_run(self, checkpoint: dict[str, Any]) -> None:
        trainer = self.trainer
        check_progress(checkpoint, trainer)
        for callback in trainer.checkpoint_callbacks:
            state = checkpoint.get("callbacks", {}).get(callback.state_key)
            if isinstance(callback, ModelCheckpoint) and state:
                keep_own_paths(state, callback, checkpoint_folder_of(callback, trainer))
        if trainer.state.fn != TrainerFn.FITTING:
            return
        adapt_ranks(checkpoint, trainer.world_size)
        if trainer.optimizers:
            check_optimizers(checkpoint, trainer)
        else:  # the optimizers are built after the network has been restored
            self._restored = checkpoint

    def on_fit_start(self) -> None:
        """Compare the optimizers of the checkpoint with those of the run, which exist by now.

        Raises:
            ConfigurationError: If they differ, naming the difference.
        """
        checkpoint, self._restored = self._restored, None
        if checkpoint is not None and self.trainer.strategy.lightning_restore_optimizer:
            check_optimizers(checkpoint, self.trainer)

    def on_train_start(self) -> None:
        """Continue the training data where the checkpoint stopped.

        Lightning restores the data's position when it sets the data up. With ``max_epochs`` it sets the data up early,
        to count the steps for the schedule; the position is not known yet, and the epoch would begin again. The end of
        the epoch is that of this run, whose ``limit_train_batches`` may be larger than that of the checkpoint's run.

        Raises:
            ConfigurationError: If ranks begin with different steps.
        """
        agree_on_step(self.trainer.global_step)
        self.trainer.fit_loop._load_combined_loader_states()
        begin_next_epoch(self.trainer.fit_loop, self._epoch_was_over)
