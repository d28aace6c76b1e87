"""Which layers of a network POET rotates, and how."""

from dataclasses import dataclass, field
from typing import Any, Self

from torch import nn

from orthotrain.errors import ConfigurationError, check_choice
from orthotrain.layers import PoetLinear, StepwiseLinear, initialize_, mergeable_layers, select_linears
from orthotrain.layers.poet.initialization import Initialization
from orthotrain.layers.poet.poet_settings import PoetSettings
from orthotrain.layers.replacement import check_wrapping, release, replace_layers
from orthotrain.layers.selection import check_excluded
from orthotrain.layers.weights.bitsandbytes_linear import is_bitsandbytes
from orthotrain.models import PretrainedModel
from orthotrain.models.deferred_weights import allocate
from orthotrain.modules.layer_overrides import LayerOverrides, set_trained, warn_of_experts
from orthotrain.plugins import create
from orthotrain.seeding import derive_seed, generator

# an override of the block size replaces the fraction
FRACTION_OF = {"block_size": "fraction", "block_size_out": "fraction_out"}


@dataclass(frozen=True)
class PoetLayers(LayerOverrides, PoetSettings):
    """Which linear layers become POET layers, the settings of a layer, and what else is not trained.

    Args:
        include: Glob patterns on module names, plain names that are the last part of module names (``q_proj``), or
            ``all-linear``; each must match a linear layer.
        exclude: Patterns of layers that are left out. The output head is trained directly, as in the paper.
        init: Values of the frozen weights: ``normalized`` (rows of norm 1, the paper's best), ``uniform`` (all singular
            values 1), ``xavier`` and ``standard`` (deviation 0.02) draw new ones, ``keep`` takes the values of the
            network (for pretrained weights).
        gain: Factor of the initial values.
        overrides: Glob pattern on module names -> settings that differ there; the first pattern that matches wins:
            ``{"*mlp*": {block_size: 128}, "*q_proj": {sides: in}}``.
        freeze: Glob patterns on names of parameters that are not trained, such as ``["*embed_tokens*", "lm_head*"]``.
    """

    include: list[str] | str = field(default_factory=lambda: ["*"])
    exclude: list[str] = field(default_factory=lambda: ["*lm_head*"])
    init: Initialization = "normalized"
    gain: float = 1.0
    freeze: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.include, str):  # one pattern, as PEFT's all-linear
            object.__setattr__(self, "include", [self.include])
        check_choice("init", self.init, Initialization)
        if not 0 < self.gain < float("inf"):
            raise ConfigurationError(f"gain={self.gain!r}: take a positive factor")
        self.variants()  # refuses a bad override now, not when the network is built

    def meaning(self) -> dict[str, Any]:
        """Return, as plain values, the settings that a resumed run cannot change."""
        # include: the state dict shows which layers are rotated
        free = {"include", "exclude", "init", "gain", "route", "activation_mode", "freeze"}
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in free}
        overrides = {
            pattern: {name: value for name, value in values.items() if name not in free}
            for pattern, values in (self.overrides or {}).items()
        }
        parameterization = create(self.used_parameterization).config()
        values |= {"stepwise": bool(self.stepwise), "parameterization": parameterization}
        return {**values, "overrides": overrides}

    def override(self, values: dict[str, Any]) -> Self:
        """Return these settings with some replaced; a block size without a fraction replaces the fraction.

        Raises:
            ConfigurationError: For an unknown name or a bad value.
        """
        fractions = {fraction: None for size, fraction in FRACTION_OF.items() if size in values}
        return super().override({**fractions, **values})

    def check_keeps(self, model: Any) -> None:
        """Refuse to draw new values over those of a pretrained model.

        Args:
            model: The network, or the object that builds it.

        Raises:
            ConfigurationError: Naming the model and the initialization.
        """
        for pattern, settings in self.variants().items():
            if isinstance(model, PretrainedModel) and settings.init != "keep":
                where = f" of overrides {pattern!r}" if pattern else ""
                raise ConfigurationError(
                    f"layers.init={settings.init!r}{where} would replace the weights of the pretrained {model.name!r}: "
                    "set init: keep, or take CausalLM for a new network"
                )

    def apply_(self, model: nn.Module, seed: int = 0) -> list[str]:
        """Replace the chosen layers of ``model`` in place, and freeze the parameters of :attr:`freeze`.

        Values and permutations come from (seed, layer name), so they are the same on every rank.

        Returns:
            The names of the replaced layers.

        Raises:
            ConfigurationError: See :func:`orthotrain.layers.replace_linears`; or if an override or a pattern of
                ``freeze`` matches nothing.
        """
        chosen = self.choose(model)

        def initialized(linear: nn.Linear, name: str) -> PoetLinear | StepwiseLinear:
            settings = self.for_name(name)
            if settings.init != "keep" and linear.weight.is_meta:
                allocate(linear)
            draws = generator(seed, name, "frozen weight", device=linear.weight.device)
            initialize_(linear.weight, settings.init, draws, settings.gain)
            layer = self._wrapped(linear, name, seed)
            release(linear)
            return layer

        replace_layers(model, chosen, initialized)
        self._freeze(model)
        warn_of_experts(model)
        return list(chosen)

    def choose(self, model: nn.Module) -> dict[str, nn.Linear]:
        """Return the layers that :meth:`apply_` replaces, by name; the model is not changed, and needs no storage.

        Raises:
            ConfigurationError: As :meth:`apply_`, except for patterns of ``freeze``.
        """
        check_excluded(model, self.exclude, type(self)().exclude)
        chosen = select_linears(model, self.include, self.exclude)
        self.refuse_unused_overrides(chosen)
        for name, linear in chosen.items():
            if is_bitsandbytes(linear):
                raise ConfigurationError(
                    f"layer {name} ({linear.out_features} x {linear.in_features}): its weight is quantized "
                    f"({type(linear).__name__}) and POET folds rotations into full values: load the model without "
                    "quantization and set storage: nf4 or int8"
                )
        check_wrapping(chosen, self._wrapped, self.for_name)
        return chosen

    def _wrapped(self, linear: nn.Linear, name: str, seed: int = 0) -> PoetLinear | StepwiseLinear:
        settings = self.for_name(name)
        kind = StepwiseLinear if settings.stepwise else PoetLinear
        return kind.from_settings(linear, settings, derive_seed(seed, name))

    def _freeze(self, model: nn.Module) -> None:
        rotations = {id(p) for _, layer in mergeable_layers(model) for p in layer.rotation_parameters()}
        direct = {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in rotations}
        set_trained("freeze", self.freeze, direct, False)

    def drawn_anew(self, model: nn.Module) -> list[str]:
        """Return the names of the layers of ``model`` whose values :meth:`apply_` replaces without reading them."""
        chosen = select_linears(model, self.include, self.exclude)
        return [name for name in chosen if self.for_name(name).init != "keep"]
