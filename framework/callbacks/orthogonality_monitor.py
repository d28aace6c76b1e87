"""How large the generators have become since the last merge, and how orthogonal the rotations still are."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from orthotrain.checkpoints.run_folder import run_folder
from orthotrain.checkpoints.stored_values import stored_curves
from orthotrain.errors import check_count
from orthotrain.files.pictures import draw_lines, panels, save
from orthotrain.layers.protocols import mergeable_layers
from orthotrain.layers.sharding import gathered
from orthotrain.layers.spectrum import spectral_bound

WARNING_ERROR = 1e-2
"""Entry of ``|R^T R - I|`` from which on a run is warned."""


class OrthogonalityMonitor(L.Callback):
    """Log ``generator_norm`` and ``orthogonality_error`` every N steps, and draw both as ``orthogonality.png``.

    ``max_generator_norm`` is a bound of ``generator_norm``. Nothing is computed between measurements. One warning tells
    when the rotations are no longer orthogonal: an error of more than 1e-2.

    Args:
        every_n_steps: Optimizer steps between measurements; None for the trainer's ``log_every_n_steps``.
        per_layer: Whether to log both for each layer too, as ``generator_norm/NAME`` and
            ``orthogonality_error/NAME``.

    Raises:
        ConfigurationError: If ``every_n_steps`` is below 1.
    """

    def __init__(self, every_n_steps: int | None = None, per_layer: bool = False) -> None:
        if every_n_steps is not None:
            check_count("OrthogonalityMonitor: every_n_steps", every_n_steps)
        self.every_n_steps = every_n_steps
        self.per_layer = per_layer
        self._told = False
        self.curves: dict[str, list[tuple[int, float]]] = {"generator_norm": [], "orthogonality_error": []}

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Measure the rotations that the previous step has left."""
        every = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (trainer.global_step + 1) % every == 0:
            states = rotation_states(pl_module)
            for index, (name, curve) in enumerate(self.curves.items()):
                largest = max((state[index] for state in states.values()), default=0.0)
                pl_module.log(name, largest)
                curve.append((trainer.global_step, largest))
                if self.per_layer:
                    pl_module.log_dict({f"{name}/{layer}": state[index] for layer, state in states.items()})
            self._warn(states)

    def _warn(self, states: dict[str, tuple[float, float]]) -> None:
        worst = max(states, key=lambda name: states[name][1], default=None)
        if self._told or worst is None or not states[worst][1] > WARNING_ERROR:
            return
        self._told = True
        norm, error = states[worst]
        rank_zero_warn(
            f"the rotations of {worst} are not orthogonal: an entry of R^T R - I is {error:.2g}, with generators of "
            f"norm {norm:.2g}: set max_generator_norm, lower their learning rate, or take parameterization: cayley"
        )

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the curves, on the first rank of a run that writes a folder."""
        if not trainer.loggers or not self.curves["generator_norm"]:
            return
        folder = run_folder(trainer)
        if folder is None or not trainer.is_global_zero:
            return
        figure, axes = panels(["bound of the largest ||Q|| of a block", "largest entry of |R^T R - I|"])
        for axis, (name, points) in zip(axes, self.curves.items(), strict=True):
            scale = "log" if any(value > 0 for _, value in points) else "linear"
            draw_lines(axis, {name.replace("_", " "): points}, xlabel="optimizer step", yscale=scale)
        save(figure, folder / "orthogonality.png")

    def state_dict(self) -> dict[str, Any]:
        """Save the curves, as plain values."""
        return {"curves": self.curves}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the stored curves."""
        self.curves = {**self.curves, **stored_curves(state_dict, "curves")}


@torch.no_grad()
def rotation_states(model: nn.Module) -> dict[str, tuple[float, float]]:
    """Measure the rotations of every layer that has rotations.

    Returns:
        Name -> the largest :func:`spectral_bound` of a block of the layer, and the largest entry of
        ``|R^T R - I| = |D + D^T + D^T D|`` over all its blocks, in fp32, so never below about 1e-7.
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
