"""COFT: bring the generators back within their bound after every optimizer step."""

from typing import Protocol, runtime_checkable

import lightning as L

from orthotrain.callbacks.step_callback import StepCallback
from orthotrain.errors import ConfigurationError
from orthotrain.layers.sharding import gathered


@runtime_checkable
class Bounded(Protocol):
    """A rotation whose generators may have a bound."""

    coft_eps: float | None
    """The bound, None for no bound."""

    def project_(self) -> None:
        """Bring the generators back within the bound."""


class ProjectGenerators(StepCallback):
    """Project every rotation that has a ``coft_eps`` after each optimizer step (COFT, arXiv:2306.07280).

    A rotation within its bound keeps its bits.

    Raises:
        ConfigurationError: If no rotation of the model has a bound when fitting starts.
    """

    def __init__(self) -> None:
        self._rotations: list[Bounded] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the bounded rotations; refuse a model without any."""
        rotations = [module for module in pl_module.modules() if isinstance(module, Bounded)]
        self._rotations = [rotation for rotation in rotations if rotation.coft_eps is not None]
        if not self._rotations:
            raise ConfigurationError("ProjectGenerators found no layer with a coft_eps: set one, or drop the callback")

    def on_step_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Project the rotations."""
        for rotation in self._rotations:
            with gathered(rotation):
                rotation.project_()
