"""Stopping a run whose numbers are no longer finite, before they are merged or saved."""

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from orthotrain.callbacks.agreement import on_any_rank
from orthotrain.callbacks.merge_rotations import MergeRotations
from orthotrain.errors import ConfigurationError, TrainingDiverged


class FiniteGuard(L.Callback):
    """Stop with the step and the parameter named when the loss, a gradient or a trained parameter is NaN or infinite.

    Gradients are looked at as they are before clipping, which spreads one NaN over all of them, parameters (generators
    among them) after the step. It tells after every batch, before rotations are merged into the frozen weights and
    before checkpoints are written: the last one saved is still good. The price is a pass over the gradients, one over
    the trained parameters, and one synchronisation with the device. Where a gradient scaler leaves out steps with
    infinite gradients (precision 16-mixed), gradients are not looked at.

    Raises:
        TrainingDiverged: At the first batch that shows it.
        ConfigurationError: When fitting starts, if a :class:`MergeRotations` would come first.
    """

    def __init__(self) -> None:
        self._gradients: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse to come after the merging."""
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        before = callbacks[: callbacks.index(self)] if self in callbacks else []
        if any(isinstance(callback, MergeRotations) for callback in before):
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
        """Look at the loss of the batch, the gradients of the step and what it has left."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        trained = {name: p.detach() for name, p in pl_module.named_parameters() if p.requires_grad}
        culprit = first_non_finite(
            {f"the gradient of {name}": norm for name, norm in self._gradients.items()}
            | norms(trained)
            | ({} if loss is None else {"the loss": torch.as_tensor(loss, device=pl_module.device).detach()})
        )
        self._gradients = {}
        if not on_any_rank(culprit is not None, pl_module.device):
            return
        if culprit == "the loss":
            culprit = f"the loss is {torch.as_tensor(loss).tolist()}"
        elif culprit is not None:
            culprit = f"{culprit} holds NaN or infinite values"
        raise TrainingDiverged(
            f"training diverged at optimizer step {trainer.global_step} (batch {batch_idx}): "
            f"{culprit or 'another rank met NaN or infinite values'}; the last checkpoint is from before it. Lower the "
            "learning rate, clip gradients, or look at the batch"
        )


def norms(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the norm of each tensor in fp32, in which values of 16 bits do not overflow.

    Of a sharded tensor it is that of this rank's part; ranks agree afterwards.
    """
    parts = [t.to_local() if isinstance(t, DTensor) else t for t in tensors.values()]
    return dict(zip(tensors, torch._foreach_norm(parts, 2, dtype=torch.float32), strict=True)) if parts else {}


def first_non_finite(values: dict[str, Tensor]) -> str | None:
    """Return the name of the first scalar that is not finite, None if all are; one device synchronisation."""
    if not values:
        return None
    finite = torch.isfinite(torch.stack([value.float() for value in values.values()]))
    if bool(finite.all()):
        return None
    return list(values)[finite.tolist().index(False)]
