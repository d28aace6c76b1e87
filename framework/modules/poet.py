"""POET pretraining (arXiv:2506.08001) as a LightningModule around any network."""

from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.enums import GradClipAlgorithmType
from torch import nn
from torch._guards import detect_fake_mode
from torch.optim import Optimizer

from orthotrain.callbacks.attached import unless_given
from orthotrain.callbacks.merge_rotations import MergeRotations, check_period, sole_merging
from orthotrain.callbacks.movement_monitor import MovementMonitor
from orthotrain.callbacks.orthogonality_monitor import OrthogonalityMonitor
from orthotrain.errors import ConfigurationError, check_choice
from orthotrain.layers import PoetLinear, StepwiseLinear, initialize_, mergeable_layers, replace_linears, select_linears
from orthotrain.layers.poet.initialization import Initialization
from orthotrain.layers.poet.poet_settings import PoetSettings
from orthotrain.layers.surgery import check_excluded, check_wrapping, release
from orthotrain.layers.weights.bitsandbytes_linear import is_bitsandbytes
from orthotrain.models.builders import CausalLM, ModelBuilder, PretrainedModel
from orthotrain.models.late_weights import allocate
from orthotrain.modules.base import BaseModule
from orthotrain.modules.clip_ramp import ClipRamp
from orthotrain.modules.micro_step import CompileMode
from orthotrain.modules.optimization import Optimization
from orthotrain.plugins import create
from orthotrain.seeding import derive_seed, generator


@dataclass(frozen=True)
class PoetLayers(PoetSettings):
    """Which linear layers become POET layers, and how: the settings of one layer, and these.

    Args:
        include: Glob patterns on module names; each must match a linear layer.
        exclude: Glob patterns taken out again. The output head is trained directly, as in the paper.
        init: Frozen values: ``normalized`` (rows of norm 1, the paper's best), ``uniform`` (all singular values 1),
            ``xavier`` and ``standard`` (deviation 0.02) draw new ones, ``keep`` takes those of the network (for
            pretrained weights).
        gain: Factor of the initial values.
        overrides: Glob pattern on module names -> settings that differ there, the first pattern that matches wins:
            ``{"*mlp*": {block_size: 128}, "*q_proj": {sides: in}}``.
    """

    include: list[str] = field(default_factory=lambda: ["*"])
    exclude: list[str] = field(default_factory=lambda: ["*lm_head*"])
    init: Initialization = "normalized"
    gain: float = 1.0
    overrides: dict[str, dict[str, Any]] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("init", self.init, Initialization)
        if not 0 < self.gain < float("inf"):
            raise ConfigurationError(f"gain={self.gain!r}: take a positive factor")
        for pattern in self.overrides or {}:
            self.for_name(pattern)  # refuses a bad setting now, not when the network is built

    def meaning(self) -> dict[str, Any]:
        """Return, as plain values, the settings that a run cannot change without becoming another one."""
        free = {"include", "exclude", "init", "gain", "centre", "activation_mode"}  # include: the state tells
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in free}
        overrides = {
            pattern: {name: value for name, value in values.items() if name not in free}
            for pattern, values in (self.overrides or {}).items()
        }
        return {**values, "parameterization": create(self.parameterization).config(), "overrides": overrides}

    def for_name(self, name: str) -> "PoetLayers":
        """Return the settings of the layer ``name``: these, or what the first override that matches makes of them.

        Raises:
            ConfigurationError: For an override that is no setting of a layer, or has a bad value.
        """
        for pattern, values in (self.overrides or {}).items():
            if name == pattern or fnmatchcase(name, pattern):
                if set(values) & {"include", "exclude", "overrides"}:
                    raise ConfigurationError(f"overrides {pattern!r}: include, exclude and overrides cannot be nested")
                return self.override({**values, "overrides": None})
        return self

    def variants(self) -> dict[str, "PoetLayers"]:
        """Return the settings that layers have: these under an empty name, and those of each override's pattern."""
        return {"": self, **{pattern: self.for_name(pattern) for pattern in self.overrides or {}}}

    def check_keeps(self, model: Any) -> None:
        """Refuse to draw new values over those of a pretrained model.

        Args:
            model: What builds the network, or the network.

        Raises:
            ConfigurationError: Naming the model and the initialisation.
        """
        for pattern, settings in self.variants().items():
            if isinstance(model, PretrainedModel) and settings.init != "keep":
                where = f" of overrides {pattern!r}" if pattern else ""
                raise ConfigurationError(
                    f"layers.init={settings.init!r}{where} would replace the weights of the pretrained {model.name!r}: "
                    "set init: keep, or take CausalLM for a new network"
                )

    def apply_(self, model: nn.Module, seed: int = 0) -> list[str]:
        """Replace the chosen layers of ``model`` in place.

        Values and permutations come from (seed, layer name): they are the same on every rank.

        Returns:
            The names of the replaced layers.

        Raises:
            ConfigurationError: See :func:`orthotrain.layers.replace_linears`; or if an override matches no layer.
        """
        check_excluded(model, self.exclude, type(self)().exclude)
        chosen = select_linears(model, self.include, self.exclude)
        names = {linear: name for name, linear in chosen.items()}
        for pattern in self.overrides or {}:
            if not any(fnmatchcase(name, pattern) for name in names.values()):
                raise ConfigurationError(
                    f"overrides pattern {pattern!r} matches none of the rotated layers: {', '.join(names.values())}"
                )

        def wrap(linear: nn.Linear, name: str) -> PoetLinear | StepwiseLinear:
            settings = self.for_name(name)
            kind = StepwiseLinear if settings.stepwise else PoetLinear
            return kind.from_settings(linear, settings, derive_seed(seed, name))

        def factory(linear: nn.Linear) -> PoetLinear | StepwiseLinear:
            name = names[linear]
            settings = self.for_name(name)
            if settings.init != "keep" and linear.weight.is_meta:
                allocate(linear)
            draws = generator(seed, name, "frozen weight", device=linear.weight.device)
            initialize_(linear.weight, settings.init, draws, settings.gain)
            layer = wrap(linear, name)
            release(linear)
            return layer

        for name, linear in chosen.items():
            if is_bitsandbytes(linear):
                raise ConfigurationError(
                    f"layer {name} ({linear.out_features} x {linear.in_features}): its weight is quantised "
                    f"({type(linear).__name__}) and POET folds rotations into full values: load the model without "
                    "quantisation and set storage: nf4 or int8"
                )
        check_wrapping(chosen, wrap)
        return replace_linears(model, self.include, self.exclude, factory)

    def drawn_anew(self, model: nn.Module) -> list[str]:
        """Return the names of the layers of ``model`` whose values :meth:`apply_` does not read."""
        chosen = select_linears(model, self.include, self.exclude)
        return [name for name in chosen if self.for_name(name).init != "keep"]


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
        check_period("merge_every", merge_every)
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
