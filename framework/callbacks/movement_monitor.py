"""How far a step moves the weights, and whether the next one goes the same way."""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from orthotrain.layers.mergeable import Mergeable, mergeable_layers
from orthotrain.layers.sharding import gathered


class MovementMonitor(L.Callback):
    """Log the last fold of every layer at a cadence; it must come before the callback that folds.

    For each layer: ``movement/NAME/rms``, the root mean square of the weight's change over that of the weight, and
    ``movement/NAME/cosine`` between the generators of this step and of the last one in which the same side moved. For
    the whole model the learning rate of the generators, ``angle``.

    Args:
        every_n_steps: Optimizer steps between measurements. A measurement folds each layer once more; in the two steps
            before it the generators are copied.
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        self.every_n_steps = every_n_steps
        self._before: dict[str, list[Tensor]] = {}
        self._last_step = 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure between the optimizer's step and the fold."""
        step = trainer.global_step
        if step == self._last_step:
            return
        self._last_step = step
        ahead = -step % self.every_n_steps
        if ahead > 2:
            return
        metrics = {}
        for name, layer in mergeable_layers(pl_module):
            with gathered(layer):
                if ahead == 0:
                    metrics[f"movement/{name}/rms"] = movement(layer)
                    metrics[f"movement/{name}/cosine"] = self._cosine(name, layer)
                self._remember(name, layer)
        if ahead == 0:
            groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
            angle = next((float(group["lr"]) for group in groups if group.get("name") == "rotations"), 0.0)
            pl_module.log_dict({**metrics, "angle": angle})
            self._before.clear()

    def _remember(self, name: str, layer: Mergeable) -> None:
        """Keep what moved; of a side that rested, what it did when it moved last."""
        moved = [p.detach().clone() for p in layer.rotation_parameters()]
        old = self._before.get(name, moved)
        self._before[name] = [new if bool(new.any()) else before for new, before in zip(moved, old, strict=True)]

    def _cosine(self, name: str, layer: Mergeable) -> float:
        now = [p.detach().flatten() for p in layer.rotation_parameters()]
        before = self._before.get(name)
        pairs = [] if before is None else [(a, b.flatten()) for a, b in zip(now, before, strict=True) if bool(a.any())]
        if not pairs:
            return 0.0
        a, b = (torch.cat(part) for part in zip(*pairs, strict=True))
        return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


@torch.no_grad()
def movement(layer: Any) -> float:
    """Return the root mean square of what a fold would change over that of the weight."""
    effective = layer.merged_weight().float()
    generators = layer.rotation_parameters()
    kept = [p.detach().clone() for p in generators]
    for parameter in generators:
        parameter.zero_()
    weight = layer.merged_weight().float()
    for parameter, value in zip(generators, kept, strict=True):
        parameter.copy_(value)
    return float((effective - weight).norm() / weight.norm().clamp_min(1e-30))
