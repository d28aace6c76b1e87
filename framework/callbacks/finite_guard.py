"""Stopping a run whose numbers are no longer finite, before it is saved."""

from typing import Any

import lightning as L
import torch
from torch import nn

from orthotrain.callbacks.agreement import on_any_rank
from orthotrain.errors import TrainingDiverged


class FiniteGuard(L.Callback):
    """Stop with the step and the parameter named when the loss or a trained parameter is NaN or infinite.

    It looks after every batch, before checkpoints are written: the last one saved is still good. The price is one
    fused norm over the trained parameters and one synchronisation with the device.

    Raises:
        TrainingDiverged: At the first batch that shows it.
    """

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the loss of the batch and at what the step has left."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        culprit = non_finite(pl_module)
        finite = culprit is None and (loss is None or bool(torch.isfinite(loss).all()))
        if not on_any_rank(not finite, pl_module.device):
            return
        if finite:
            what = "another rank met NaN or infinite values"
        elif culprit is not None:
            what = f"{culprit} holds NaN or infinite values"
        else:
            what = f"the loss is {torch.as_tensor(loss).tolist()}"
        raise TrainingDiverged(
            f"training diverged at optimizer step {trainer.global_step} (batch {batch_idx}): {what}; the last "
            "checkpoint is from before it. Lower the learning rate, clip gradients, or look at the batch"
        )


@torch.no_grad()
def non_finite(model: nn.Module) -> str | None:
    """Return the name of the first trained parameter with a value that is not finite, None if there is none."""
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        return None
    norms = torch.stack([norm.float() for norm in torch._foreach_norm(list(trained.values()))])
    if bool(torch.isfinite(norms).all()):
        return None
    # a norm overflows in 16 bits where every value is finite
    return next((name for name, p in trained.items() if not bool(torch.isfinite(p).all())), None)
