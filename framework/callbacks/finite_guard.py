"""Stopping a run whose numbers are no longer finite, before they are merged or saved."""

from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from orthotrain.callbacks.merge_rotations import MergeRotations, merging_of
from orthotrain.callbacks.step_callback import StepCallback
from orthotrain.callbacks.throughput import logs_at
from orthotrain.devices.host_reads import read_waits
from orthotrain.distributed.agreement import on_any_rank
from orthotrain.errors import ConfigurationError, TrainingDiverged

MOST_NOTES = 1000
"""Batches whose notes are kept on the device before the host reads them, also in a run that logs nothing."""


class Note(NamedTuple):
    """Values of one batch that must be finite.

    Attributes:
        step: Optimizer steps taken by the end of the batch.
        batch: Number of the batch.
        names: Name of each value.
        values: ``(len(names),)`` fp32, on the device.
    """

    step: int
    batch: int
    names: list[str]
    values: Tensor


class FiniteGuard(StepCallback):
    """Stop a run, and name the step and the parameter, when the loss, a gradient or a parameter is NaN or infinite.

    The guard checks the gradients before clipping, which spreads one NaN over all gradients, and the trained parameters
    (generators included) after the step. On a CPU it checks every batch at once. On any other device the host would
    wait for each check. There the guard keeps the values of every batch on the device and checks all of them together:
    in the steps that the trainer logs, before a merge, before a validation, before a checkpoint is written, and when
    fitting ends. So every merge and every checkpoint comes after a check, and the last checkpoint is still good.
    Layers that fold every step keep values that are not finite out of their weights themselves. The cost is one pass
    over the gradients and one pass over the trained parameters. Gradients are not checked where a gradient scaler skips
    steps with infinite gradients (precision 16-mixed).

    Raises:
        TrainingDiverged: At the first check that finds such a value; the message names its batch and its step.
        ConfigurationError: When fitting starts, if a :class:`MergeRotations` would come first.
    """

    def __init__(self) -> None:
        self._gradients: dict[str, Tensor] = {}
        self._notes: list[Note] = []
        self._merging: MergeRotations | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse to come after the callback that merges."""
        self._gradients, self._notes = {}, []
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        self._merging = merging_of(trainer)
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
        """Keep the loss of the batch, and the norms of gradients and parameters; on a CPU, check them at once."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        trained = {name: p.detach() for name, p in pl_module.named_parameters() if p.requires_grad}
        values = {f"the gradient of {name}": norm for name, norm in self._gradients.items()} | norms(trained)
        if loss is not None:
            # the loss may have any shape that backward accepts
            values["the loss"] = torch.as_tensor(loss, device=pl_module.device).detach().sum()
        self._gradients = {}
        self._notes.append(Note(trainer.global_step, batch_idx, list(values), stacked(values)))
        if not read_waits(pl_module.device) or len(self._notes) >= MOST_NOTES:
            self.look(trainer, pl_module)
        super().on_train_batch_end(trainer, pl_module)

    def on_step_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look in the steps that the trainer logs, and before a merge."""
        step = trainer.global_step
        if logs_at(trainer, step) or (self._merging and self._merging.needs_finite(step)):
            self.look(trainer, pl_module)

    def look(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any, **kw: Any) -> None:
        """Check all values since the last check, which waits once for the device. Every rank must call this method.

        Raises:
            TrainingDiverged: If a value is not finite, on this rank or another.
        """
        notes = self._notes
        if not notes or trainer.state.fn != TrainerFn.FITTING:
            return
        found = first_non_finite(notes)
        if not on_any_rank(found is not None, pl_module.device):
            self._notes = []  # after an error the values are kept, so that an attempt to save is refused too
            return
        if found is None:
            step, batch, culprit = notes[-1].step, notes[-1].batch, "another rank met NaN or infinite values"
        else:
            (step, batch, names, _), index, value = found
            problem = f"is {value}" if names[index] == "the loss" else "holds NaN or infinite values"
            culprit = f"{names[index]} {problem}"
        raise TrainingDiverged(
            f"training diverged at optimizer step {step} (batch {batch}): {culprit}; the last checkpoint is from "
            "before it. Lower the learning rate, clip gradients, or look at the batch"
        )

    on_validation_start = look  # a checkpoint may be chosen by the loss of the validation
    on_save_checkpoint = on_train_end = look


def norms(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the norm of each tensor: in fp64 if a tensor is fp64, else in fp32, in which values of 16 bits fit.

    For a sharded tensor, the norm of this rank's part; the ranks agree afterwards.
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
    """Return the first value that is not finite: its note, its index in the note, the value; None if all are finite.

    Waits for the device once, or not at all if nothing was noted; a second time to read the value.
    """
    noted = [note for note in notes if note.names]
    if not noted:
        return None
    finite = torch.isfinite(torch.cat([note.values for note in noted]))
    if bool(finite.all()):
        return None
    places = [(note, index) for note in noted for index in range(len(note.names))]
    note, index = places[finite.tolist().index(False)]
    return note, index, float(note.values[index])
