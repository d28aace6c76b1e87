"""Merge-then-reinitialise: fold the rotations into the frozen weights every N optimizer steps."""

from typing import Any

import lightning as L
from torch import nn
from torch.optim import Optimizer

from orthotrain.errors import ConfigurationError
from orthotrain.layers.mergeable import mergeable_layers


class MergeRotations(L.Callback):
    """Fold every :class:`Mergeable` layer each ``every_n_steps`` optimizer steps (arXiv:2506.08001, section 3.3).

    Counted are optimizer steps, not micro-batches. A merge changes no output beyond rounding; it resets the generators
    to zero, draws the next permutations and forgets the optimizer's state of the generators, whose coordinates have
    changed their meaning. Every rank folds for itself and reaches the same bits: nothing is communicated.

    Args:
        every_n_steps: Optimizer steps between merges, T_m; at least 1.

    Raises:
        ConfigurationError: If ``every_n_steps`` is below 1, or the model has no mergeable layer when fitting starts.
    """

    def __init__(self, every_n_steps: int = 400) -> None:
        if isinstance(every_n_steps, bool) or not isinstance(every_n_steps, int) or every_n_steps < 1:
            raise ConfigurationError(f"every_n_steps={every_n_steps!r}: merge every 1 or more optimizer steps")
        self.every_n_steps = every_n_steps
        self.merges = 0
        self._last_step = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse a model without a layer to merge."""
        if next(mergeable_layers(pl_module), None) is None:
            raise ConfigurationError(
                "MergeRotations found no layer to merge: wrap the model with replace_linears first"
            )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Merge when an optimizer step that ends a period has just been taken."""
        step = trainer.global_step
        if step != self._last_step and self.should_merge(step):
            merge_rotations(pl_module, trainer.optimizers)
            self.merges += 1
            pl_module.log("merges", float(self.merges), rank_zero_only=True)
        self._last_step = step

    def should_merge(self, step: int) -> bool:
        """Decide whether to merge after optimizer step ``step`` (counted from 1); override for another rhythm."""
        return step % self.every_n_steps == 0

    def state_dict(self) -> dict[str, Any]:
        """Save the counters as plain values."""
        return {"merges": self.merges, "last_step": self._last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the counters, so that a merge at the checkpoint's step is not repeated."""
        self.merges, self._last_step = state_dict["merges"], state_dict["last_step"]


def merge_rotations(model: nn.Module, optimizers: list[Optimizer]) -> list[str]:
    """Merge every mergeable layer once and drop the optimizers' state of its generators.

    Args:
        model: Any module.
        optimizers: Optimizers that may hold the generators; torch's, fused or not, or any other that keeps a
            dictionary of per-parameter state and fills it at the first step.

    Returns:
        The names of the merged layers.
    """
    names = []
    for name, layer in mergeable_layers(model):
        layer.merge_()
        for parameter in layer.rotation_parameters():
            for optimizer in optimizers:
                optimizer.state.pop(parameter, None)
        names.append(name)
    return names
