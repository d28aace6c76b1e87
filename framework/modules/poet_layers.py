"""Which layers of a network POET rotates, and how."""

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from orthotrain.errors import ConfigurationError, check_choice
from orthotrain.layers import PoetLinear, StepwiseLinear, initialize_, replace_linears, select_linears
from orthotrain.layers.poet.initialization import Initialization
from orthotrain.layers.poet.poet_settings import PoetSettings
from orthotrain.layers.surgery import check_excluded, check_wrapping, release
from orthotrain.layers.weights.bitsandbytes_linear import is_bitsandbytes
from orthotrain.models import PretrainedModel
from orthotrain.models.deferred_weights import allocate
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
