"""How far a step moves the weights, and whether it has the same direction as the step before."""

import math

import lightning as L
import torch
from torch import Tensor

from orthotrain.callbacks.merge_rotations import merging_of
from orthotrain.callbacks.step_callback import StepCallback
from orthotrain.errors import check_count
from orthotrain.layers.protocols import Stepwise, mergeable_layers
from orthotrain.layers.sharding import gathered


class MovementMonitor(StepCallback):
    """Log how far the last step moved every step-wise layer; must come before the callback that folds.

    For each layer:

    - ``movement/NAME/rms``: root mean square of the weight's change, divided by that of the weight.
    - ``movement/NAME/angle``: angle of the step in radians, the unit of the learning rate: the root mean square of the
      turns, twice the singular values of Q, over the sides that moved.
    - ``movement/NAME/cosine``: cosine between the generators of this step and those of the last step in which the same
      side moved. Left out if no side has moved since the permutations changed.

    For the whole model: ``angle``, the learning rate of the generators.

    Args:
        every_n_steps: Optimizer steps between measurements. A measurement folds each layer once more; in the two steps
            before a measurement the generators are copied.

    Raises:
        ConfigurationError: If ``every_n_steps`` is below 1.
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        check_count("MovementMonitor: every_n_steps", every_n_steps)
        self.every_n_steps = every_n_steps
        self._before: dict[str, list[Tensor]] = {}
        self._period = 0

    def on_step_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure between the optimizer's step and the fold."""
        self._forget_other_permutations(trainer)
        steps_to_go = -trainer.global_step % self.every_n_steps
        if steps_to_go > 2:
            self._before.clear()
            return
        metrics: dict[str, float] = {}
        for name, layer in mergeable_layers(pl_module):
            if isinstance(layer, Stepwise):
                with gathered(layer):
                    if steps_to_go == 0:
                        metrics |= {f"movement/{name}/{key}": value for key, value in self._measure(name, layer)}
                    self._remember(name, layer)
        if steps_to_go == 0:
            groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
            angle = next(
                (float(group["lr"]) for group in groups if str(group.get("name")).startswith("rotations")), 0.0
            )
            pl_module.log_dict({**metrics, "angle": angle})

    def _forget_other_permutations(self, trainer: L.Trainer) -> None:
        """Drop generators of earlier permutations, under which the same numbers mean other rotations."""
        merging = merging_of(trainer)
        period = 0 if merging is None else (trainer.global_step - 1) // merging.resample_every
        if period != self._period:
            self._before.clear()
        self._period = period

    def _remember(self, name: str, layer: Stepwise) -> None:
        """Keep the generators of each side; for a side that rested, those of the last step in which it moved."""
        moved = [p.detach().clone() for p in layer.rotation_parameters()]
        old = self._before.get(name, moved)
        # chosen on the device: nothing is logged in these steps, and the host must not wait
        self._before[name] = [torch.where(new.any(), new, before) for new, before in zip(moved, old, strict=True)]

    def _measure(self, name: str, layer: Stepwise) -> list[tuple[str, float]]:
        now = [p.detach() for p in layer.rotation_parameters()]
        measured = [("rms", float(layer.movement())), ("angle", angle_of([p for p in now if bool(p.any())]))]
        pairs = [(a, b) for a, b in zip(now, self._before.get(name, []), strict=False) if a.any() and b.any()]
        if pairs:
            a, b = (torch.cat([p.flatten() for p in part]) for part in zip(*pairs, strict=True))
            measured.append(("cosine", float(torch.nn.functional.cosine_similarity(a, b, dim=0))))
        return measured


def angle_of(generators: list[Tensor]) -> float:
    """Return the root mean square of the turns of all blocks of generators ``(n, b(b-1)/2)`` in radians, 0 if empty."""
    # every generator stands in Q twice, and a block has as many singular values as rows
    squares = sum(2 * float(p.square().sum()) for p in generators)
    values = sum(p.shape[0] * (1 + math.isqrt(1 + 8 * p.shape[1])) // 2 for p in generators)
    # R is I + 2Q to first order
    return 2 * math.sqrt(squares / values) if values else 0.0
