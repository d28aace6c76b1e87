"""Random numbers that depend on the batch alone, so that a resumed run draws the numbers of the uninterrupted run."""

from typing import Any

import lightning as L
import torch

from orthotrain.checkpoints.stored_values import stored_count
from orthotrain.seeding import seed_draws


class BatchSeeds(L.Callback):
    """Seed torch, numpy and Python before each training batch, from (seed, epoch, position of the batch in the epoch).

    No generator's state has to be saved, for any rank or device, and dropout is the same after a resume at any step.
    The position counts the batches of all ranks: one rank that accumulates two batches and two ranks draw the same
    numbers for the same samples, and so does a run that resumes on another number of ranks. The seed is the one that
    the global generator of rank 0 was given (``seed_everything``), and is stored in the checkpoint.
    """

    def __init__(self) -> None:
        self.seed: int | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Agree on a seed, unless a checkpoint has brought one."""
        if self.seed is None:
            self.seed = trainer.strategy.broadcast(torch.initial_seed())

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed the generators for this batch."""
        assert self.seed is not None
        position = batch_idx * trainer.world_size + trainer.global_rank
        seed_draws(self.seed, trainer.current_epoch, position)

    def state_dict(self) -> dict[str, Any]:
        """Save the seed."""
        return {"seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the seed that the run began with."""
        self.seed = stored_count(state_dict, "seed", optional=True, signed=True)
