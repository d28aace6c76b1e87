"""What training leaves of the spectra, and how much of the space of rotations it has reached."""

import csv
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from orthotrain.checkpoints.run_folder import run_folder
from orthotrain.checkpoints.stored_values import stored_count, stored_curves, stored_tensors
from orthotrain.console.progress import shown
from orthotrain.errors import ConfigurationError
from orthotrain.files.atomic_writes import open_to_append
from orthotrain.files.pictures import draw_lines, panels, save
from orthotrain.layers.mergeable import Covering, Mergeable, Scaled, mergeable_layers
from orthotrain.layers.sharding import gathered
from orthotrain.layers.spectrum import singular_values, spectral_drift, svd_entropy

DECOMPOSING = "measuring spectra"


class SpectrumMonitor(L.Callback):
    """Log singular values' statistics of merged weights at a cadence, and draw them when fitting ends.

    For each watched layer: ``spectrum/NAME/entropy`` (:func:`svd_entropy`), ``condition`` (largest over smallest
    singular value), ``largest``, ``drift`` (largest ``|s_i - s_i(start)| / s_1(start)``); where the layer has one, its
    trained ``scale``, which all singular values are divided by; and where the layer tells, ``pair_coverage``: the part
    of all pairs of coordinates that have lain in one block since the start, the smaller one of both sides. Of all
    layers ``spectrum/drift``, the largest one. Between measurements it costs nothing; one takes a singular value
    decomposition of each layer.

    Pictures in the run folder: ``spectrum.png``, the start against now, and ``coverage.png``. With ``values`` the
    singular values themselves too: as histograms to TensorBoard loggers, and to ``spectra.csv``, a row for each value.

    Args:
        every_n_steps: Optimizer steps between measurements; the first is before the first step.
        include: Glob patterns on names of layers.
        max_layers: How many of the matching layers are watched, evenly spread over the network.
        values: Whether to write all singular values at each measurement, the start included. A run that goes on from
            an earlier checkpoint writes the steps that it takes again once more.

    Raises:
        ConfigurationError: If a number is below 1, or no layer matches when fitting starts.
    """

    def __init__(
        self, every_n_steps: int = 1000, include: list[str] | None = None, max_layers: int = 4, values: bool = False
    ) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("max_layers", max_layers)):
            if value < 1:
                raise ConfigurationError(f"SpectrumMonitor: {name}={value!r}: take 1 or more")
        self.every_n_steps = every_n_steps
        self.include = include or ["*"]
        self.max_layers = max_layers
        self.values = values
        self.start: dict[str, Tensor] = {}
        self.now: dict[str, Tensor] = {}
        self.coverage: dict[str, list[tuple[int, float]]] = {}
        self._last_step = 0
        self._measured_at = -1

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember the spectra of the start; a resumed run has them from its checkpoint."""
        watched = self.watched(pl_module)
        if self.start and not watched.keys() == self.start.keys() == self.now.keys():
            raise ConfigurationError(
                "SpectrumMonitor: the checkpoint has spectra of other layers than those that are watched: set include "
                "and max_layers as they were, or take an earlier checkpoint"
            )
        if not self.start:
            self.start = {name: spectrum(layer) for name, layer in shown(watched.items(), DECOMPOSING, "layers")}
            self.now = dict(self.start)
            self._write_values(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure after an optimizer step of the cadence."""
        step = trainer.global_step
        if step != self._last_step and step % self.every_n_steps == 0:
            pl_module.log_dict(self.measure(pl_module, step))
            self._write_values(trainer)
        self._last_step = step

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure once more, unless the last step was one of the cadence, and draw, on the first rank."""
        folder = run_folder(trainer)
        if folder is None:
            return
        if self._measured_at != trainer.global_step:
            self.measure(pl_module, trainer.global_step)
            self._write_values(trainer)
        if trainer.is_global_zero:
            self.draw(folder)

    def watched(self, model: nn.Module) -> dict[str, Mergeable]:
        """Return the layers that are measured, by name.

        Raises:
            ConfigurationError: If no layer matches.
        """
        layers = dict(mergeable_layers(model))
        names = [name for name in layers if any(fnmatchcase(name, pattern) for pattern in self.include)]
        if not names:
            raise ConfigurationError(
                f"SpectrumMonitor: include={self.include} matches no mergeable layer; there are {', '.join(layers)}"
            )
        count = min(self.max_layers, len(names))
        return {name: layers[name] for name in (names[k * len(names) // count] for k in range(count))}

    def measure(self, model: nn.Module, step: int) -> dict[str, float]:
        """Return the statistics of all watched layers by their logged names."""
        metrics: dict[str, float] = {}
        self._measured_at = step
        for name, layer in shown(self.watched(model).items(), DECOMPOSING, "layers"):
            values = self.now[name] = spectrum(layer)
            start = self.start[name]
            metrics[f"spectrum/{name}/entropy"] = float(svd_entropy(values))
            metrics[f"spectrum/{name}/condition"] = float(values[0] / values[-1].clamp_min(1e-30))
            metrics[f"spectrum/{name}/largest"] = float(values[0])
            metrics[f"spectrum/{name}/drift"] = spectral_drift(values, start)
            if isinstance(layer, Scaled) and (factor := layer.trained_factor()) is not None:
                metrics[f"spectrum/{name}/scale"] = factor
            if isinstance(layer, Covering):
                pairs = min(side.pairs for side in layer.coverage().values())
                metrics[f"spectrum/{name}/pair_coverage"] = pairs
                self.coverage.setdefault(name, []).append((step, pairs))
        drifts = [spectral_drift(self.now[name], self.start[name]) for name in self.now]
        return {**metrics, "spectrum/drift": max(drifts)}

    def _write_values(self, trainer: L.Trainer) -> None:
        if not self.values:
            return
        folder = run_folder(trainer)
        if folder is None or not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                for name, values in self.now.items():
                    logger.experiment.add_histogram(f"spectrum/{name}", values, trainer.global_step)
        path = folder / "spectra.csv"
        fresh = not path.exists()
        with open_to_append(path) as file:
            rows = csv.writer(file)
            rows.writerows([["step", "layer", "index", "value"]] * fresh)
            for name, values in self.now.items():
                rows.writerows([trainer.global_step, name, i, f"{v:.7g}"] for i, v in enumerate(values.tolist()))

    def draw(self, folder: Path) -> None:
        """Write ``spectrum.png`` and, where layers tell their coverage, ``coverage.png``."""
        figure, (axes,) = panels(["singular values: start (dashed) and now"])
        for name, values in self.now.items():
            (line,) = axes.plot(values.tolist(), label=name)
            axes.plot(self.start[name].tolist(), "--", color=line.get_color(), alpha=0.7)
        axes.set(xlabel="index", ylabel="singular value")
        axes.legend(fontsize="small")
        save(figure, folder / "spectrum.png")
        if self.coverage:
            figure, (axes,) = panels(["pairs of coordinates that have shared a block since the start"])
            draw_lines(axes, self.coverage, xlabel="optimizer step", ylabel="part of all pairs", ylim=(0, 1.02))
            save(figure, folder / "coverage.png")

    def state_dict(self) -> dict[str, Any]:
        """Save what was seen, as plain values and tensors."""
        return {"start": self.start, "now": self.now, "coverage": self.coverage, "last_step": self._last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what was seen before."""
        self.start, self.now = stored_tensors(state_dict, "start"), stored_tensors(state_dict, "now")
        self.coverage, self._last_step = stored_curves(state_dict, "coverage"), stored_count(state_dict, "last_step")


@torch.no_grad()
def spectrum(layer: Mergeable) -> Tensor:
    """Return the singular values of the merged weight without its trained scale, descending, on the CPU in fp32."""
    with gathered(layer):
        values = singular_values(layer.merged_weight().float().flatten(1)).cpu()
        factor = layer.trained_factor() if isinstance(layer, Scaled) else None
    return values if factor is None else values / factor
