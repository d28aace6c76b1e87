"""COFT: bring the generators back to their bound after every optimizer step."""

from typing import Any, Protocol, runtime_checkable

import lightning as L

from orthotrain.errors import ConfigurationError
from orthotrain.layers.sharding import gathered


@runtime_checkable
class Bounded(Protocol):
    """A rotation whose generators may have a bound."""

    coft_eps: float | None
    """The bound, None for none."""

    def project_(self) -> None:
        """Bring the generators back to the bound."""


class ProjectGenerators(L.Callback):
    """Project every rotation that has a ``coft_eps`` after each optimizer step (COFT, arXiv:2306.07280).

    Counted are optimizer steps, not micro-batches. A rotation within its bound keeps its bits.

    Raises:
        ConfigurationError: If no rotation of the model has a bound when fitting starts.
    """

    def __init__(self) -> None:
        self._rotations: list[Bounded] = []
        self._last_step = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the bounded rotations; refuse a model without one."""
        rotations = [module for module in pl_module.modules() if isinstance(module, Bounded)]
        self._rotations = [rotation for rotation in rotations if rotation.coft_eps is not None]
        if not self._rotations:
            raise ConfigurationError("ProjectGenerators found no layer with a coft_eps: set one, or drop the callback")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Project when an optimizer step has just been taken."""
        if trainer.global_step != self._last_step:
            for rotation in self._rotations:
                with gathered(rotation):
                    rotation.project_()
        self._last_step = trainer.global_step
