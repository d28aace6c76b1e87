"""How far a step moves the weights, and whether it goes the same way as the one before."""

import math
from typing import Any

import lightning as L
import torch
from torch import Tensor

from orthotrain.callbacks.merge_rotations import MergeRotations
from orthotrain.errors import ConfigurationError
from orthotrain.layers.mergeable import Stepwise, mergeable_layers
from orthotrain.layers.sharding import gathered


class MovementMonitor(L.Callback):
    """Log the last fold of every layer that folds every step; it must come before the callback that folds.

    For each layer: ``movement/NAME/rms``, the root mean square of the weight's change over that of the weight;
    ``movement/NAME/angle``, the angle of the step as the learning rate counts it, the root mean square of the singular
    values of Q over the sides that moved (the rotation is by twice that); ``movement/NAME/cosine`` between the
    generators of this step and of the last one in which the same side moved, left out where there was none since the
    permutations changed. For the whole model the learning rate of the generators, ``angle``.

    Args:
        every_n_steps: Optimizer steps between measurements. A measurement folds each layer once more; in the two steps
            before it the generators are copied.

    Raises:
        ConfigurationError: If ``every_n_steps`` is below 1.
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        if isinstance(every_n_steps, bool) or not isinstance(every_n_steps, int) or every_n_steps < 1:
            raise ConfigurationError(f"every_n_steps={every_n_steps!r}: measure every 1 or more optimizer steps")
        self.every_n_steps = every_n_steps
        self._before: dict[str, list[Tensor]] = {}
        self._last_step = self._period = 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure between the optimizer's step and the fold."""
        step = trainer.global_step
        if step == self._last_step:
            return
        self._last_step = step
        self._forget_other_permutations(trainer, step)
        ahead = -step % self.every_n_steps
        if ahead > 2:
            self._before.clear()
            return
        metrics: dict[str, float] = {}
        for name, layer in mergeable_layers(pl_module):
            if isinstance(layer, Stepwise):
                with gathered(layer):
                    if ahead == 0:
                        measured = self._measure(name, layer)
                        metrics |= {f"movement/{name}/{what}": value for what, value in measured.items()}
                    self._remember(name, layer)
        if ahead == 0:
            groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
            angle = next((float(group["lr"]) for group in groups if group.get("name") == "rotations"), 0.0)
            pl_module.log_dict({**metrics, "angle": angle})

    def _forget_other_permutations(self, trainer: L.Trainer, step: int) -> None:
        """Drop what was remembered in another frame, where the same numbers mean other rotations."""
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        merging = next((callback for callback in callbacks if isinstance(callback, MergeRotations)), None)
        period = 0 if merging is None else (step - 1) // merging.resample_every
        if period != self._period:
            self._before.clear()
        self._period = period

    def _remember(self, name: str, layer: Stepwise) -> None:
        """Keep what moved; of a side that rested, what it did when it moved last."""
        moved = [p.detach().clone() for p in layer.rotation_parameters()]
        old = self._before.get(name, moved)
        # chosen on the device: in these steps nothing is logged, and the host shall not wait
        self._before[name] = [torch.where(new.any(), new, before) for new, before in zip(moved, old, strict=True)]

    def _measure(self, name: str, layer: Stepwise) -> dict[str, float]:
        now = [p.detach() for p in layer.rotation_parameters()]
        measured = {"rms": float(layer.movement()), "angle": angle_of([p for p in now if bool(p.any())])}
        pairs = [(a, b) for a, b in zip(now, self._before.get(name, []), strict=False) if a.any() and b.any()]
        if pairs:
            a, b = (torch.cat([p.flatten() for p in part]) for part in zip(*pairs, strict=True))
            measured["cosine"] = float(torch.nn.functional.cosine_similarity(a, b, dim=0))
        return measured


def angle_of(generators: list[Tensor]) -> float:
    """Return the root mean square of the singular values of all blocks of generators ``(n, b(b-1)/2)``, 0 for none."""
    # every generator stands in Q twice, and a block has as many singular values as rows
    squares = sum(2 * float(p.square().sum()) for p in generators)
    values = sum(p.shape[0] * (1 + math.isqrt(1 + 8 * p.shape[1])) // 2 for p in generators)
    return math.sqrt(squares / values) if values else 0.0
