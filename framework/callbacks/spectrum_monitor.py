"""How far training changes the singular values, and which part of the space of rotations it has reached."""

import csv
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from orthotrain.callbacks.step_callback import StepCallback
from orthotrain.checkpoints.run_folder import run_folder
from orthotrain.checkpoints.stored_values import stored_curves, stored_tensors
from orthotrain.console.progress import shown
from orthotrain.errors import ConfigurationError, check_count
from orthotrain.files.atomic_writes import open_to_append
from orthotrain.files.pictures import draw_lines, new_figure, panels, save
from orthotrain.layers.protocols import Covering, Mergeable, Scaled, mergeable_layers
from orthotrain.layers.spectrum import spectral_drift, spectrum, spread, svd_entropy

DECOMPOSING = "measuring spectra"


class SpectrumMonitor(StepCallback):
    """Log statistics of the singular values of merged weights every N steps, and draw them when fitting ends.

    For each watched layer:

    - ``spectrum/NAME/entropy``: :func:`svd_entropy`.
    - ``condition``: largest over smallest singular value.
    - ``largest``: the largest singular value.
    - ``drift``: largest ``|s_i - s_i(start)| / s_1(start)``.
    - ``scale``: the trained scale of a layer that has one; the singular values above are divided by this scale.
    - ``pair_coverage``: for layers that count it, the part of all pairs of coordinates that have shared a block since
      the start; the smaller value of both sides.

    ``spectrum/drift`` is the largest drift of the watched layers. A measurement takes a singular value decomposition of
    each of them; steps between measurements cost nothing.

    Pictures in the run folder: ``spectrum.png``, the start against now and their difference, layer by layer, and
    ``coverage.png``. With ``values`` the
    singular values themselves are written too: as histograms to TensorBoard loggers, and to ``spectra.csv``, one row
    for each value.

    Args:
        every_n_steps: Optimizer steps between measurements; the first measurement is before the first step.
        include: Glob patterns on names of layers.
        max_layers: How many of the matching layers are watched, spread over depth and roles (:func:`spread`).
        values: Whether to write all singular values at each measurement, with those of the start. A run that resumes
            from an earlier checkpoint writes the steps that it repeats a second time.

    Raises:
        ConfigurationError: If a number is below 1, or no layer matches when fitting starts.
    """

    def __init__(
        self, every_n_steps: int = 1000, include: list[str] | None = None, max_layers: int = 8, values: bool = False
    ) -> None:
        check_count("SpectrumMonitor: every_n_steps", every_n_steps)
        check_count("SpectrumMonitor: max_layers", max_layers)
        self.every_n_steps = every_n_steps
        self.include = include or ["*"]
        self.max_layers = max_layers
        self.values = values
        self.start: dict[str, Tensor] = {}
        self.now: dict[str, Tensor] = {}
        self.coverage: dict[str, list[tuple[int, float]]] = {}
        self._measured_at = -1

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the spectra of the start; a resumed run has them from its checkpoint."""
        watched = self.watched(pl_module)
        if self.start and not watched.keys() == self.start.keys() == self.now.keys():
            raise ConfigurationError(
                "SpectrumMonitor: the checkpoint has spectra of other layers than the run watches: set include "
                "and max_layers as they were, or take an earlier checkpoint"
            )
        if not self.start:
            with shown(watched.items(), DECOMPOSING, "layers") as layers:
                self.start = {name: spectrum(layer) for name, layer in layers}
            self.now = dict(self.start)
            self._write_values(trainer)

    def on_step_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure every ``every_n_steps`` optimizer steps."""
        if trainer.global_step % self.every_n_steps == 0:
            pl_module.log_dict(self.measure(pl_module, trainer.global_step))
            self._write_values(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the last step, unless it was measured already, and draw on the first rank."""
        folder = run_folder(trainer)
        if folder is None:
            return
        if self._measured_at != trainer.global_step:
            self.measure(pl_module, trainer.global_step)
            self._write_values(trainer)
        if trainer.is_global_zero:
            self.draw(folder)

    def watched(self, model: nn.Module) -> dict[str, Mergeable]:
        """Return the layers to measure, by name.

        Raises:
            ConfigurationError: If no layer matches.
        """
        layers = dict(mergeable_layers(model))
        names = [name for name in layers if any(fnmatchcase(name, pattern) for pattern in self.include)]
        if not names:
            raise ConfigurationError(
                f"SpectrumMonitor: include={self.include} matches no mergeable layer; there are {', '.join(layers)}"
            )
        return {name: layers[name] for name in spread(names, self.max_layers)}

    def measure(self, model: nn.Module, step: int) -> dict[str, float]:
        """Return the statistics of all watched layers by their logged names."""
        metrics: dict[str, float] = {}
        self._measured_at = step
        with shown(self.watched(model).items(), DECOMPOSING, "layers") as layers:
            for name, layer in layers:
                statistics = self._statistics(name, layer, step)
                metrics |= {f"spectrum/{name}/{statistic}": value for statistic, value in statistics.items()}
        drifts = [spectral_drift(self.now[name], self.start[name]) for name in self.now]
        return {**metrics, "spectrum/drift": max(drifts)}

    def _statistics(self, name: str, layer: Mergeable, step: int) -> dict[str, float]:
        values = self.now[name] = spectrum(layer)
        statistics = {
            "entropy": float(svd_entropy(values)),
            "condition": float(values[0] / values[-1].clamp_min(1e-30)),
            "largest": float(values[0]),
            "drift": spectral_drift(values, self.start[name]),
        }
        if isinstance(layer, Scaled) and (factor := layer.trained_factor()) is not None:
            statistics["scale"] = factor
        if isinstance(layer, Covering):
            pairs = statistics["pair_coverage"] = min(side.pairs for side in layer.coverage().values())
            self.coverage.setdefault(name, []).append((step - 1, pairs))  # the step of the loggers
        return statistics

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
        """Write ``spectrum.png`` and, if layers count their coverage, ``coverage.png``."""
        draw_spectra(self.start, self.now, folder / "spectrum.png")
        if self.coverage:
            figure, (axes,) = panels(["pairs of coordinates that have shared a block since the start"])
            draw_lines(axes, self.coverage, xlabel="optimizer step", ylabel="part of all pairs", ylim=(0, 1.02))
            save(figure, folder / "coverage.png")

    def state_dict(self) -> dict[str, Any]:
        """Save the spectra and the coverage, as plain values and tensors."""
        return {"start": self.start, "now": self.now, "coverage": self.coverage}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the stored spectra and coverage."""
        self.start, self.now = stored_tensors(state_dict, "start"), stored_tensors(state_dict, "now")
        self.coverage = stored_curves(state_dict, "coverage")


def draw_spectra(start: dict[str, Tensor], now: dict[str, Tensor], path: Path) -> Path:
    """Draw singular values at the start and now as a PNG, and return its path.

    Each layer has a column. Above are both spectra: the start as a broad pale line, now as a thin line on it. Below is
    the change of each singular value, in units of the largest one at the start.

    Args:
        start: Name of a layer -> singular values at the start, descending.
        now: The same layers at the end.
        path: File to write.
    """
    columns = min(len(now), 4)
    bands = -(-len(now) // columns)
    figure = new_figure(1.2 + 3.2 * columns, 4.6 * bands)
    grid = figure.add_gridspec(2 * bands, columns, height_ratios=[3, 2] * bands)
    for place, (name, values) in enumerate(now.items()):
        band, column = divmod(place, columns)
        above = figure.add_subplot(grid[2 * band, column], ylabel="" if column else "singular value")
        below = figure.add_subplot(grid[2 * band + 1, column], ylabel="" if column else "change / largest")
        _draw_layer(above, below, start[name].double(), values.double())
        above.set_title(name.removeprefix("model."), fontsize="small")
    return save(figure, path)


def _draw_layer(above: Any, below: Any, start: Tensor, now: Tensor) -> None:
    above.plot(start.tolist(), color="C0", alpha=0.3, linewidth=6, label="start")
    above.plot(now.tolist(), color="black", linewidth=1, label="now")
    above.legend(fontsize="small")
    above.set(ylim=(0, None))
    below.axhline(0, color="C0", alpha=0.3, linewidth=3)
    below.plot(((now - start) / start[0].clamp_min(1e-30)).tolist(), color="black", linewidth=1)
    below.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    below.set(xlabel="index")
    for axes in (above, below):
        axes.grid(alpha=0.3)
