"""A check of the network that runs once, before the first batch of a training or an evaluation."""

from typing import Any

import lightning as L


class FirstBatchCheck(L.Callback):
    """Call :meth:`check` before each batch, so that a subclass can check a network once, with a real batch."""

    def check(self, trainer: L.Trainer, module: Any, batch: Any) -> None:
        """Check the network, unless that was done; a subclass implements it."""
        raise NotImplementedError

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Check the network before the first batch of a training."""
        self.check(trainer, pl_module, batch)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Check the network before the first batch of a validation."""
        self.check(trainer, pl_module, batch)

    def on_test_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Check the network before the first batch of a test."""
        self.check(trainer, pl_module, batch)
