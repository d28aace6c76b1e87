"""A largest norm of the generators, within which a rotation is orthogonal."""

import math
from typing import Literal, Protocol, runtime_checkable

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from orthotrain.callbacks.step_callback import StepCallback
from orthotrain.callbacks.throughput import logs_at
from orthotrain.errors import ConfigurationError
from orthotrain.layers.spectrum import limit_norms_

GeneratorNorm = float | Literal["auto"]

LARGEST_ERROR = 1e-3
"""Error of the singular values of R that ``auto`` allows: below the rounding of bf16, 2e-3."""


class Ranged(Protocol):
    """A parameterization."""

    def largest_norm(self, error: float) -> float:
        """Return the largest ``||Q||_2`` at which the singular values of R are within ``error`` of 1."""


@runtime_checkable
class Rotation(Protocol):
    """A rotation with generators."""

    generators: Tensor
    parameterization: Ranged


class LimitGenerators(StepCallback):
    """Scale blocks of generators whose ``||Q||_2`` exceeds a limit back to it, after each optimizer step.

    A series like Cayley-Neumann is orthogonal only near zero: beyond, the layer changes its singular values, and then
    diverges. The norm is measured by an upper bound (:func:`~orthotrain.layers.spectrum.spectral_bound`). A block
    within the limit keeps its bits. One warning tells that the limit was reached. The host waits for nothing between
    the steps that the trainer logs.

    Args:
        max_generator_norm: The limit. ``auto`` takes the limit of each parameterization at which the singular values of
            R are within 1e-3 of 1: 0.537 for Cayley-Neumann of order 4, and none for exact Cayley.

    Raises:
        ConfigurationError: If the limit is neither positive nor ``auto``.
    """

    def __init__(self, max_generator_norm: GeneratorNorm = "auto") -> None:
        number = isinstance(max_generator_norm, int | float) and not isinstance(max_generator_norm, bool)
        if max_generator_norm != "auto" and not (number and 0 < float(max_generator_norm) < math.inf):
            raise ConfigurationError(
                f"max_generator_norm={max_generator_norm!r}: take a positive norm, auto for the range in which each "
                "parameterization is orthogonal, or null for no limit"
            )
        self.max_generator_norm = max_generator_norm
        self._generators: dict[float, list[Tensor]] = {}
        self._scaled: Tensor | None = None
        self._told = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the generators and their limits."""
        self._generators, self._scaled, self._told = {}, None, False
        for module in pl_module.modules():
            if isinstance(module, Rotation):
                own = module.parameterization.largest_norm(LARGEST_ERROR)
                limit = own if self.max_generator_norm == "auto" else float(self.max_generator_norm)
                if math.isfinite(limit):
                    self._generators.setdefault(limit, []).append(module.generators)

    def on_step_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Scale the generators; in the steps that the trainer logs, warn if any was scaled before."""
        for limit, generators in self._generators.items():
            scaled = limit_norms_(generators, limit)
            self._scaled = scaled if self._scaled is None else self._scaled | scaled
        if logs_at(trainer, trainer.global_step):
            self._tell()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Warn if the limit was reached after the last logged step, and release the generators."""
        self._tell()
        self._generators, self._scaled = {}, None

    def _tell(self) -> None:
        if self._told or self._scaled is None or not bool(self._scaled):
            return
        self._told = True
        limits = ", ".join(f"{limit:.3g}" for limit in self._generators)
        rank_zero_warn(
            f"generators have reached max_generator_norm ({limits}) and are scaled back to it after each step: lower "
            "the learning rate of the generators, or take a parameterization that is orthogonal at every norm (cayley)"
        )
