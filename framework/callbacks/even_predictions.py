"""Predictions of a sharded network when ranks have different numbers of batches."""

from typing import Any

import lightning as L

from orthotrain.distributed.agreement import least_of_ranks
from orthotrain.layers.sharding import is_sharded


class EvenPredictions(L.Callback):
    """Let a rank that has no more batches predict its last batch again, until all ranks are done.

    All ranks together gather a layer of a fully sharded network. Without this callback the ranks that still predict
    would wait forever for a rank that has ended. The repeated predictions are dropped.
    """

    def __init__(self) -> None:
        self._repeats = 0
        self._last_batch: Any = None

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count how many batches fewer this rank has than the rank with the most."""
        self._repeats = 0
        if is_sharded(pl_module):
            own = int(min(sum(trainer.num_predict_batches), 2**31 - 1))
            self._repeats = -least_of_ranks(-own, trainer.strategy.root_device) - own

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Keep the batch."""
        self._last_batch = batch if self._repeats else None

    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take part in the predictions of the other ranks."""
        for _ in range(self._repeats):
            with trainer.precision_plugin.predict_step_context():
                pl_module.predict_step(self._last_batch, 0)
        self._last_batch = None
