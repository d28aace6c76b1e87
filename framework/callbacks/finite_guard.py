"""Stopping a run whose numbers are no longer finite, before they are merged or saved."""

from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from orthotrain.callbacks.merge_rotations import MergeRotations
from orthotrain.callbacks.throughput import logs_at
from orthotrain.devices.host_reads import read_waits
from orthotrain.distributed.agreement import on_any_rank
from orthotrain.errors import ConfigurationError, TrainingDiverged

LONGEST_WITHOUT_A_LOOK = 1000
"""Batches whose notes are kept before the host looks at them, also in a run that logs nothing."""


class Note(NamedTuple):
    """What a batch has left to look at.

    Attributes:
        step: Optimizer steps taken by its end.
        batch: Its number.
        names: What the values are.
        values: ``(len(names),)`` fp32, on the device.
    """

    step: int
    batch: int
    names: list[str]
    values: Tensor


class FiniteGuard(L.Callback):
    """Stop with the step and the parameter named when the loss, a gradient or a trained parameter is NaN or infinite.

    Gradients are looked at as they are before clipping, which spreads one NaN over all of them, parameters (generators
    among them) after the step. On a CPU the guard looks after every batch. On any other device a look waits for the
    device. There the guard notes the values of every batch on the device, and looks at all notes together: in the steps
    that the trainer logs, before a merge, before a validation, before a checkpoint is written, and when fitting ends.
    So rotations are merged and checkpoints are written only after a look, and the last checkpoint is still good.
    Layers that fold every step keep what is not finite out of their weights themselves. The price is a pass over the
    gradients and one over the trained parameters. Where a gradient scaler leaves out steps with infinite gradients
    (precision 16-mixed), gradients are not looked at.

    Raises:
        TrainingDiverged: At the first look that shows it, naming the batch and the step at which it happened.
        ConfigurationError: When fitting starts, if a :class:`MergeRotations` would come first.
    """

    def __init__(self) -> None:
        self._gradients: dict[str, Tensor] = {}
        self._notes: list[Note] = []
        self._last_step = 0
        self._merging: MergeRotations | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse to come after the merging."""
        self._gradients, self._notes, self._last_step = {}, [], trainer.global_step
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        merging = [callback for callback in callbacks if isinstance(callback, MergeRotations)]
        self._merging = next(iter(merging), None)
        if self._merging and self in callbacks and callbacks.index(self._merging) < callbacks.index(self):
            raise ConfigurationError(
                "FiniteGuard comes after MergeRotations, which would merge NaN into the frozen weights: put it before"
            )

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Note the norm of each gradient, without waiting for the device."""
        if getattr(trainer.precision_plugin, "scaler", None) is None:
            gradients = {name: p.grad for name, p in pl_module.named_parameters() if p.grad is not None}
            self._gradients |= norms(gradients)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the loss of the batch, the gradients of the step and what it has left; look where it is time to."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        trained = {name: p.detach() for name, p in pl_module.named_parameters() if p.requires_grad}
        values = {f"the gradient of {name}": norm for name, norm in self._gradients.items()} | norms(trained)
        if loss is not None:
            # of whatever shape that backward takes
            values["the loss"] = torch.as_tensor(loss, device=pl_module.device).detach().sum()
        self._gradients = {}
        self._notes.append(Note(trainer.global_step, batch_idx, list(values), stacked(values)))
        if not read_waits(pl_module.device) or self._is_time(trainer):
            self.look(trainer, pl_module)
        self._last_step = trainer.global_step

    def _is_time(self, trainer: L.Trainer) -> bool:
        step = trainer.global_step
        if step != self._last_step and (logs_at(trainer, step) or (self._merging and self._merging.needs_finite(step))):
            return True
        return len(self._notes) >= LONGEST_WITHOUT_A_LOOK

    def look(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look at all that was noted since the last look: one wait for the device. Every rank must call it.

        Raises:
            TrainingDiverged: If some of it is not finite, on this rank or another.
        """
        notes = self._notes
        if not notes or trainer.state.fn != TrainerFn.FITTING:
            return
        found = first_non_finite(notes)
        if not on_any_rank(found is not None, pl_module.device):
            self._notes = []  # kept otherwise: whoever saves after the error is refused too
            return
        if found is None:
            step, batch, culprit = notes[-1].step, notes[-1].batch, "another rank met NaN or infinite values"
        else:
            (step, batch, names, _), place, value = found
            said = f"is {value}" if names[place] == "the loss" else "holds NaN or infinite values"
            culprit = f"{names[place]} {said}"
        raise TrainingDiverged(
            f"training diverged at optimizer step {step} (batch {batch}): {culprit}; the last checkpoint is from "
            "before it. Lower the learning rate, clip gradients, or look at the batch"
        )

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look before a validation, whose loss a checkpoint may be chosen by."""
        self.look(trainer, pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Look before a checkpoint is written."""
        self.look(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look at the last steps."""
        self.look(trainer, pl_module)


def look_before_saving(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    """Let the callbacks of a trainer look: Lightning does not tell them of checkpoints with weights alone."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, FiniteGuard):
            callback.look(trainer, pl_module)
        elif isinstance(callback, MergeRotations):
            callback.look()


def norms(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the norm of each tensor in fp32, in which values of 16 bits do not overflow, or wider where one is wider.

    Of a sharded tensor it is that of this rank's part; ranks agree afterwards.
    """
    parts = [t.to_local() if isinstance(t, DTensor) else t for t in tensors.values()]
    parts = [part.coalesce().values() if part.is_sparse else part for part in parts]
    if not parts:
        return {}
    wide = torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32
    return dict(zip(tensors, torch._foreach_norm(parts, 2, dtype=wide), strict=True))


def stacked(values: dict[str, Tensor]) -> Tensor:
    """Return scalars of one device as one tensor in fp32."""
    return torch.stack([value.float() for value in values.values()]) if values else torch.empty(0)


def first_non_finite(notes: list[Note]) -> tuple[Note, int, float] | None:
    """Return the first value that is not finite: its note, its place in the note, itself; None if all are finite.

    One wait for the device, or none if nothing was noted; a second one for the value.
    """
    noted = [note for note in notes if note.names]
    if not noted:
        return None
    finite = torch.isfinite(torch.cat([note.values for note in noted]))
    if bool(finite.all()):
        return None
    place = finite.tolist().index(False)
    for note in noted:
        if place < len(note.names):
            return note, place, float(note.values[place])
        place -= len(note.names)
    raise AssertionError("the place lies in no note")
