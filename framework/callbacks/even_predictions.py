"""Predictions of a sharded network when ranks have different numbers of batches."""

from typing import Any

import lightning as L

from orthotrain.distributed.agreement import least_of_ranks
from orthotrain.layers.sharding import is_sharded


class EvenPredictions(L.Callback):
    """Let a rank that is done go on with its last batch, for nothing, until all are done.

    A layer of a fully sharded network is gathered by all ranks together: those that still predict would wait for ever
    for one that has ended.
    """

    def __init__(self) -> None:
        self._more = 0
        self._last: Any = None

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count the batches that other ranks have and this one has not."""
        self._more = 0
        if is_sharded(pl_module):
            mine = int(min(sum(trainer.num_predict_batches), 2**31 - 1))
            self._more = -least_of_ranks(-mine, trainer.strategy.root_device) - mine

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the batch."""
        self._last = batch if self._more else None

    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take part in what the others predict."""
        for _ in range(self._more):
            with trainer.precision_plugin.predict_step_context():
                pl_module.predict_step(self._last, 0)
        self._last = None
