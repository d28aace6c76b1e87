"""POET pretraining (arXiv:2506.08001) as a LightningModule around any network."""

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.enums import GradClipAlgorithmType
from torch import nn
from torch._guards import detect_fake_mode
from torch.optim import Optimizer

from orthotrain.callbacks.merge_rotations import MergeRotations
from orthotrain.callbacks.movement_monitor import MovementMonitor
from orthotrain.callbacks.orthogonality_monitor import OrthogonalityMonitor
from orthotrain.errors import ConfigurationError, check_count
from orthotrain.layers import mergeable_layers
from orthotrain.models import CausalLM, ModelBuilder
from orthotrain.modules.attached_callbacks import sole_merging, unless_given
from orthotrain.modules.base import BaseModule
from orthotrain.modules.micro_step import CompileMode
from orthotrain.modules.optimization import Optimization
from orthotrain.modules.poet_layers import PoetLayers


@dataclass(frozen=True)
class ClipRamp:
    """Clip gradients harder just after a merge, when the generators' optimizer state is empty.

    The bound rises linearly from ``start`` times the trainer's ``gradient_clip_val`` to all of it (the official POET
    code ramps from 0.1 in 10 steps during early training).

    Layers that are merged early keep that state: no ramp follows.

    Args:
        steps: Optimizer steps of the ramp.
        start: Factor of the bound in the first step after a merge.
        until_step: Optimizer step after which merges are no longer followed by a ramp; None for the whole run.
    """

    steps: int = 10
    start: float = 0.1
    until_step: int | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.start <= 1:
            raise ConfigurationError(
                f"clip_ramp steps={self.steps}, start={self.start}: take 1 or more steps, and a start in (0, 1]"
            )

    def factor(self, step: int, last_merge: int | None) -> float:
        """Return the factor of the bound at optimizer step ``step`` when the last merge came after ``last_merge``."""
        if last_merge is None or (self.until_step is not None and step > self.until_step):
            return 1.0
        return min(1.0, self.start + (1 - self.start) * (step - last_merge) / self.steps)


class PoetModule(BaseModule):
    """Pretrain any network with POET: rotations of its frozen linear layers, everything else trained directly.

    Subclass it and override :meth:`loss` for another objective.

    Args:
        model: The network, or what builds it.
        layers: Which linear layers are rotated, and how.
        merge_every: Optimizer steps between merges, T_m. The callback that merges is attached by the module.
        max_generator_norm: Fold a layer early, keeping permutations and optimizer state, when ``||Q||_2`` of a block
            may be larger than this; None for never. 0.3 for Cayley-Neumann; exact parameterizations need none. See
            :class:`MergeRotations`.
        resample_every: Steps between new permutations of layers that fold every step; None for at each merge.
        clip_ramp: Harder clipping after merges, None for none; it scales the trainer's ``gradient_clip_val``.
        freeze: Glob patterns on names of parameters that are not trained, such as ``["*embed_tokens*", "lm_head*"]``.
        optimization: Learning rates, weight decay, optimizer and schedule.
        seed: Seed of frozen values and permutations.
        chunked_loss: Whether the loss goes without whole logits, see :class:`BaseModule`.
        compile: See :class:`BaseModule`.

    Raises:
        ConfigurationError: If ``merge_every`` is below 1, or new values would be drawn over pretrained ones; when the
            network is built, if a layer cannot be wrapped.
    """

    def __init__(
        self,
        model: ModelBuilder | nn.Module | Callable[[], nn.Module],
        layers: PoetLayers = PoetLayers(),
        merge_every: int = 400,
        max_generator_norm: float | None = None,
        resample_every: int | None = None,
        clip_ramp: ClipRamp | None = None,
        freeze: list[str] | None = None,
        optimization: Optimization = Optimization(),
        seed: int = 0,
        chunked_loss: bool | None = None,
        compile: CompileMode = "none",
    ) -> None:
        super().__init__(model, optimization, chunked_loss=chunked_loss, compile=compile)
        check_count("merge_every", merge_every)
        layers.check_keeps(model)
        self.save_hyperparameters("merge_every", "max_generator_norm", "resample_every", "seed")
        self.layers = layers
        self.clip_ramp = clip_ramp
        self.freeze_patterns = list(freeze or [])
        self.seed = seed
        self.wrapped_names: list[str] = []
        # built here, so that a bad value is refused now and not when the trainer starts
        self.merging = MergeRotations(merge_every, max_generator_norm, resample_every)
        for pattern, settings in layers.variants().items():
            if settings.stepwise and merge_every != 1:
                what = f"overrides {pattern!r} that" if pattern else "layers that"
                raise ConfigurationError(f"merge_every={merge_every}: {what} are stepwise fold every step, set it to 1")

    def build(self, builder: Callable[[], nn.Module]) -> nn.Module:
        """Build the network, of a :class:`CausalLM` without the weights that are drawn anew when it is wrapped."""
        # one that is built without any storage needs none of it; a subclass may wrap other layers
        real = detect_fake_mode() is None and torch.get_default_device().type != "meta"
        own = type(self).wrap, type(builder).__call__, getattr(type(builder), "build", None)
        if real and isinstance(builder, CausalLM) and own == (PoetModule.wrap, CausalLM.__call__, CausalLM.build):
            return builder.build(without=self.layers.drawn_anew)
        return super().build(builder)

    def wrap(self, model: nn.Module) -> None:
        """Replace the chosen linear layers by POET layers, and freeze what is not to be trained."""
        self.wrapped_names = self.layers.apply_(model, self.seed)
        rotations = {id(p) for _, layer in mergeable_layers(model) for p in layer.rotation_parameters()}
        direct = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in rotations}
        for pattern in self.freeze_patterns:
            chosen = [parameter for name, parameter in direct.items() if fnmatchcase(name, pattern)]
            if not chosen:
                raise ConfigurationError(
                    f"freeze pattern {pattern!r} matches no trained parameter; there are {', '.join(direct)}"
                )
            for parameter in chosen:
                parameter.requires_grad_(False)

    def configure_callbacks(self) -> list[L.Callback]:
        """Attach the merging: a POET run cannot forget it.

        What looks at a step comes before it, and is left out if the trainer has one.

        Raises:
            ConfigurationError: If the trainer has a callback that merges too.
        """
        kinds = {settings.stepwise for settings in self.layers.variants().values()}
        watching = [MovementMonitor()] * (True in kinds) + [OrthogonalityMonitor()] * (False in kinds)
        own = unless_given(self._trainer, watching)
        return [*super().configure_callbacks(), *own, *sole_merging(self._trainer, self.merging)]

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the trainer says, more tightly after a merge if there is a ramp.

        Raises:
            ConfigurationError: If there is a ramp and nothing that it could scale.
        """
        if self.clip_ramp is not None:
            if gradient_clip_val is None:
                raise ConfigurationError("clip_ramp scales trainer.gradient_clip_val: set it, or leave the ramp out")
            gradient_clip_val *= self.clip_ramp.factor(self.trainer.global_step, self.merging.last_merge)
            # self.clip_gradients refuses every bound but the trainer's own
            algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
            self.trainer.precision_plugin.clip_gradients(optimizer, gradient_clip_val, algorithm)
            return
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note what the rotations mean, as plain values."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["poet"] = {"seed": self.seed, **self.layers.meaning()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint whose rotations mean something else.

        Raises:
            ConfigurationError: Naming the setting that differs.
        """
        before, now = checkpoint.get("poet", {}), {"seed": self.seed, **self.layers.meaning()}
        if not isinstance(before, dict) or any(isinstance(value, torch.Tensor) for value in before.values()):
            raise ConfigurationError("the checkpoint does not say what its rotations mean (poet); take an earlier one")
        for name, value in before.items():
            if name in now and value != now[name]:
                raise ConfigurationError(
                    f"the checkpoint was trained with {name}={value!r}, this run has {now[name]!r}: "
                    "use the config it was made with"
                )
        super().on_load_checkpoint(checkpoint)
