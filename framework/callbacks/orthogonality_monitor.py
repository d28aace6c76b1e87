"""How far the rotations have gone since the last merge, and how orthogonal they still are."""

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from orthotrain.layers.mergeable import mergeable_layers


class OrthogonalityMonitor(L.Callback):
    """Log ``generator_norm`` and ``orthogonality_error`` at a cadence.

    Args:
        every_n_steps: Optimizer steps between measurements; None for the trainer's ``log_every_n_steps``.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        self.every_n_steps = every_n_steps

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Measure what the step before this one has left."""
        every = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (trainer.global_step + 1) % every == 0:
            norm, error = rotation_state(pl_module)
            pl_module.log_dict({"generator_norm": norm, "orthogonality_error": error})


@torch.no_grad()
def rotation_state(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Measure all rotations of a model.

    Returns:
        The largest Euclidean norm of one block's generators, an upper bound of its ``||Q||_2``; and the largest entry
        of ``|R^T R - I| = |D + D^T + D^T D|`` over all blocks, in fp32, so its floor is about 1e-7.
    """
    norms, errors = [torch.zeros(())], [torch.zeros(())]
    for _, layer in mergeable_layers(model):
        norms += [generators.norm(dim=-1).max().cpu() for generators in layer.rotation_parameters()]
        errors += [(d + d.mT + d.mT @ d).abs().max().cpu() for d in layer.displacements()]
    return torch.stack(norms).max(), torch.stack(errors).max()
