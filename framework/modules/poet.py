"""POET pretraining (arXiv:2506.08001) as a LightningModule around any network."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from torch import nn
from torch._guards import detect_fake_mode

from orthotrain.callbacks.merge_rotations import MergeRotations
from orthotrain.callbacks.movement_monitor import MovementMonitor
from orthotrain.callbacks.orthogonality_monitor import OrthogonalityMonitor
from orthotrain.errors import ConfigurationError, check_count
from orthotrain.models import CausalLM, ModelBuilder
from orthotrain.modules.attached_callbacks import sole_merging, unless_given
from orthotrain.modules.base import BaseModule
from orthotrain.modules.micro_step import CompileMode
from orthotrain.modules.optimization import Optimization
from orthotrain.modules.poet_layers import PoetLayers
from orthotrain.optimizers import LieOptimizer
from orthotrain.optimizers.generator_groups import USUAL_ANGLE

MERGE_EVERY = 400
RESAMPLE_EVERY, ANGLE = 200, USUAL_ANGLE
"""Defaults of step-wise POET: optimizer steps between new permutations, and the angle of a step in radians."""


class PoetModule(BaseModule):
    """Pretrain any network with POET: rotations of its frozen linear layers, everything else trained directly.

    Subclass it and override :meth:`loss` for another objective. The module attaches the callback that merges
    (:class:`MergeRotations`).

    Args:
        model: The network, or a callable that builds it.
        layers: Which linear layers are rotated, and how.
        merge_every: Optimizer steps between merges, T_m; None for 400, or 1 with ``stepwise``.
        max_generator_norm: Fold a layer early, keeping permutations and optimizer state, when ``||Q||_2`` of a block
            may be larger than this; None for never. 0.3 for Cayley-Neumann; exact parameterizations need none. See
            :class:`MergeRotations`.
        resample_every: Steps between new permutations in layers that are folded at every step; None for 200 with
            ``stepwise``, and for ``merge_every`` otherwise.
        stepwise: Step-wise POET, whose rotations are folded at every step. It sets ``layers.stepwise`` and changes the
            defaults of settings that are not given: ``merge_every`` is 1, ``resample_every`` is 200,
            ``layers.parameterization`` is Cayley-Neumann of order 2, and ``optimization.rotation_optimizer`` is
            :class:`LieOptimizer` with a ``rotation_lr`` of 0.025 radians a step.
        optimization: Learning rates, weight decay, optimizers, schedule and clipping.
        seed: Seed of frozen values and permutations.
        chunked_loss: See :class:`BaseModule`.
        compile: See :class:`BaseModule`.

    Raises:
        ConfigurationError: If ``merge_every`` is below 1, or new values would be drawn over pretrained ones; when the
            network is built, if a layer cannot be wrapped.

    Example:
        >>> network = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> module = PoetModule(network, PoetLayers(block_size=4), stepwise=True)
        >>> module.merging.every_n_steps, module.merging.resample_every
        (1, 200)
    """

    def __init__(
        self,
        model: ModelBuilder | nn.Module | Callable[[], nn.Module],
        layers: PoetLayers = PoetLayers(),
        merge_every: int | None = None,
        max_generator_norm: float | None = None,
        resample_every: int | None = None,
        stepwise: bool = False,
        optimization: Optimization = Optimization(),
        seed: int = 0,
        chunked_loss: bool | None = None,
        compile: CompileMode = "none",
    ) -> None:
        if stepwise:
            if layers.stepwise is False:
                raise ConfigurationError(
                    "stepwise=True with layers.stepwise=False: remove the second key, or set it in layers.overrides "
                    "for the layers that merge"
                )
            layers, optimization = replace(layers, stepwise=True), stepwise_optimization(optimization)
            resample_every = RESAMPLE_EVERY if resample_every is None else resample_every
        merge_every = (1 if stepwise else MERGE_EVERY) if merge_every is None else merge_every
        super().__init__(model, optimization, chunked_loss=chunked_loss, compile=compile)
        check_count("merge_every", merge_every)
        layers.check_keeps(model)
        self.save_hyperparameters("merge_every", "max_generator_norm", "resample_every", "seed")
        self.layers = layers
        self.seed = seed
        self.wrapped_names: list[str] = []
        for pattern, settings in layers.variants().items():
            if settings.stepwise and merge_every != 1:
                which = f"overrides {pattern!r} that" if pattern else "layers that"
                raise ConfigurationError(
                    f"merge_every={merge_every}: {which} are stepwise fold every step, set it to 1"
                )
        # built here, so that a bad value is refused now and not when the trainer starts
        self.merging = MergeRotations(merge_every, max_generator_norm, resample_every)

    def build(self, builder: Callable[[], nn.Module]) -> nn.Module:
        """Build the network; a :class:`CausalLM` without the weights that :meth:`wrap` replaces by new ones."""
        # not for a network without storage, nor in a subclass, which may wrap other layers
        real = detect_fake_mode() is None and torch.get_default_device().type != "meta"
        own = type(self).wrap, type(builder).__call__
        if real and isinstance(builder, CausalLM) and own == (PoetModule.wrap, CausalLM.__call__):
            return builder(without=self.layers.drawn_anew)
        return super().build(builder)

    def wrap(self, model: nn.Module) -> None:
        """Replace the chosen linear layers by POET layers, and freeze the parameters of ``layers.freeze``."""
        self.wrapped_names = self.layers.apply_(model, self.seed)

    def check_targets(self, model: nn.Module) -> None:
        """Refuse layers that cannot be rotated; see :class:`PoetLayers`."""
        if type(self).wrap is PoetModule.wrap:
            self.layers.choose(model)

    def configure_callbacks(self) -> list[L.Callback]:
        """Attach the monitors that the trainer does not have, and the callback that merges.

        Monitors run before the merge, so that they see the generators of the finished step.

        Raises:
            ConfigurationError: If the trainer has a callback that merges too.
        """
        kinds = {bool(settings.stepwise) for settings in self.layers.variants().values()}
        watching = [MovementMonitor()] * (True in kinds) + [OrthogonalityMonitor()] * (False in kinds)
        own = unless_given(self._trainer, watching)
        return [*super().configure_callbacks(), *own, *sole_merging(self._trainer, self.merging)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the settings on which the meaning of the rotations depends, as plain values."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["poet"] = {"seed": self.seed, **self.layers.meaning()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint whose rotations have another meaning.

        Raises:
            ConfigurationError: Naming the setting that differs.
        """
        before, now = checkpoint.get("poet", {}), {"seed": self.seed, **self.layers.meaning()}
        if not isinstance(before, dict) or any(isinstance(value, torch.Tensor) for value in before.values()):
            raise ConfigurationError("the checkpoint has no settings of its rotations (poet); take an earlier one")
        for name, value in before.items():
            if name in now and value != now[name]:
                raise ConfigurationError(
                    f"the checkpoint was trained with {name}={value!r}, this run has {now[name]!r}: "
                    "use the config it was made with"
                )
        super().on_load_checkpoint(checkpoint)


def stepwise_optimization(optimization: Optimization) -> Optimization:
    """Return an optimization whose generators are trained by :class:`LieOptimizer`, unless another one is given."""
    if optimization.rotation_optimizer is not None:
        return optimization
    rate = ANGLE if optimization.rotation_lr is None else optimization.rotation_lr
    return replace(optimization, rotation_optimizer=LieOptimizer, rotation_lr=rate)
