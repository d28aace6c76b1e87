"""How far the rotations have gone since the last merge, and how orthogonal they still are."""

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from orthotrain.callbacks.pictures import draw_lines, panels, run_folder, save
from orthotrain.layers.mergeable import mergeable_layers
from orthotrain.layers.sharding import gathered


class OrthogonalityMonitor(L.Callback):
    """Log ``generator_norm`` and ``orthogonality_error`` at a cadence; ``orthogonality.png`` shows both.

    Args:
        every_n_steps: Optimizer steps between measurements; None for the trainer's ``log_every_n_steps``.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        self.every_n_steps = every_n_steps
        self.curves: dict[str, list[tuple[int, float]]] = {"generator_norm": [], "orthogonality_error": []}

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Measure what the step before this one has left."""
        every = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (trainer.global_step + 1) % every == 0:
            measured = dict(zip(self.curves, rotation_state(pl_module), strict=True))
            pl_module.log_dict(measured)
            for name, value in measured.items():
                self.curves[name].append((trainer.global_step, float(value)))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw what was measured, on the first rank of a run that writes a folder."""
        if not trainer.loggers or not self.curves["generator_norm"]:
            return
        folder = run_folder(trainer)
        if not trainer.is_global_zero:
            return
        titles = ["largest norm of a block's generators", "largest entry of |R^T R - I|"]
        figure, axes = panels(titles)
        for axis, (name, points) in zip(axes, self.curves.items(), strict=True):
            draw_lines(axis, {name.replace("_", " "): points}, xlabel="optimizer step", yscale="log")
        save(figure, folder / "orthogonality.png")

    def state_dict(self) -> dict[str, Any]:
        """Save the curves, as plain values."""
        return {"curves": self.curves}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what was seen before."""
        self.curves = state_dict["curves"]


@torch.no_grad()
def rotation_state(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Measure all rotations of a model.

    Returns:
        The largest Euclidean norm of one block's generators, an upper bound of its ``||Q||_2``; and the largest entry
        of ``|R^T R - I| = |D + D^T + D^T D|`` over all blocks, in fp32, so its floor is about 1e-7.
    """
    norms, errors = [torch.zeros(())], [torch.zeros(())]
    for _, layer in mergeable_layers(model):
        with gathered(layer, frozen=False):
            norms += [generators.norm(dim=-1).max().cpu() for generators in layer.rotation_parameters()]
            errors += [(d + d.mT + d.mT @ d).abs().max().cpu() for d in layer.displacements()]
    return torch.stack(norms).max(), torch.stack(errors).max()
