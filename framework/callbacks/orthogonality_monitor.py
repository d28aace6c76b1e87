"""How far the rotations have gone since the last merge, and how orthogonal they still are."""

from typing import Any

import lightning as L
import torch
from torch import nn
from torch.optim import Optimizer

from orthotrain.checkpoints.run_folder import run_folder
from orthotrain.checkpoints.stored_values import stored_curves
from orthotrain.errors import ConfigurationError
from orthotrain.files.pictures import draw_lines, panels, save
from orthotrain.layers.mergeable import mergeable_layers
from orthotrain.layers.sharding import gathered
from orthotrain.layers.spectrum import spectral_bound


class OrthogonalityMonitor(L.Callback):
    """Log ``generator_norm`` and ``orthogonality_error`` at a cadence; ``orthogonality.png`` shows both.

    The first is what ``max_generator_norm`` is compared with. Between measurements nothing is computed.

    Args:
        every_n_steps: Optimizer steps between measurements; None for the trainer's ``log_every_n_steps``.
        per_layer: Whether both are logged for each layer too, as ``generator_norm/NAME`` and
            ``orthogonality_error/NAME``.

    Raises:
        ConfigurationError: If ``every_n_steps`` is below 1.
    """

    def __init__(self, every_n_steps: int | None = None, per_layer: bool = False) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ConfigurationError(f"OrthogonalityMonitor: every_n_steps={every_n_steps!r}: take 1 or more, or null")
        self.every_n_steps = every_n_steps
        self.per_layer = per_layer
        self.curves: dict[str, list[tuple[int, float]]] = {"generator_norm": [], "orthogonality_error": []}

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Measure what the step before this one has left."""
        every = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (trainer.global_step + 1) % every == 0:
            states = rotation_states(pl_module)
            for place, (name, curve) in enumerate(self.curves.items()):
                largest = max((state[place] for state in states.values()), default=0.0)
                pl_module.log(name, largest)
                curve.append((trainer.global_step, largest))
                if self.per_layer:
                    pl_module.log_dict({f"{name}/{layer}": state[place] for layer, state in states.items()})

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw what was measured, on the first rank of a run that writes a folder."""
        if not trainer.loggers or not self.curves["generator_norm"]:
            return
        folder = run_folder(trainer)
        if folder is None or not trainer.is_global_zero:
            return
        titles = ["bound of the largest ||Q|| of a block", "largest entry of |R^T R - I|"]
        figure, axes = panels(titles)
        for axis, (name, points) in zip(axes, self.curves.items(), strict=True):
            draw_lines(axis, {name.replace("_", " "): points}, xlabel="optimizer step", yscale="log")
        save(figure, folder / "orthogonality.png")

    def state_dict(self) -> dict[str, Any]:
        """Save the curves, as plain values."""
        return {"curves": self.curves}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what was seen before."""
        self.curves = {**self.curves, **stored_curves(state_dict, "curves")}


@torch.no_grad()
def rotation_states(model: nn.Module) -> dict[str, tuple[float, float]]:
    """Measure the rotations of every layer that has some.

    Returns:
        Name -> the largest :func:`spectral_bound` of one of its blocks, and the largest entry of
        ``|R^T R - I| = |D + D^T + D^T D|`` over all of them, in fp32, so its floor is about 1e-7.
    """
    found: dict[str, torch.Tensor] = {}
    for name, layer in mergeable_layers(model):
        with gathered(layer, frozen=False):
            displacements = layer.displacements()
            if displacements:
                bounds = [spectral_bound(generators).max() for generators in layer.rotation_parameters()]
                errors = [(d + d.mT + d.mT @ d).abs().max().float() for d in displacements]
                found[name] = torch.stack([torch.stack(bounds).max(), torch.stack(errors).max()])
    if not found:
        return {}
    # one wait for the device, not two for each layer
    values = torch.stack([state.to(next(iter(found.values())).device) for state in found.values()]).tolist()
    return {name: (bound, error) for name, (bound, error) in zip(found, values, strict=True)}
