"""Which layers of a network OFT rotates, how, and which other parameters are trained."""

import glob
from dataclasses import dataclass, field

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from orthotrain.errors import ConfigurationError
from orthotrain.layers.oft import OFT_CLASSES, OftLayer, OftSettings, oft_layer
from orthotrain.layers.replacement import check_wrapping, release, replace_layers, swap_modules
from orthotrain.layers.selection import check_excluded, select_layers
from orthotrain.layers.weights.bitsandbytes_linear import compute_dtype_of, is_bitsandbytes
from orthotrain.layers.weights.frozen_linear import frozen_linears
from orthotrain.modules.layer_overrides import LayerOverrides, set_trained, warn_of_experts


@dataclass(frozen=True)
class OftLayers(LayerOverrides, OftSettings):
    """Which layers get a rotation, the settings of a layer, and what else is trained. Everything else is frozen.

    Parameters that the model's checkpoint did not hold, such as a new head, have random values: they are trained in
    full and never wrapped (:class:`orthotrain.models.PretrainedModel` notes them). Quantized layers of bitsandbytes
    that are not chosen become :class:`orthotrain.layers.FrozenLinear`.

    Args:
        include: Glob patterns on module names, plain names that are the last part of module names (``q_proj``), or
            ``all-linear``. A pattern chooses the linear layers that it matches; if it matches none, it chooses the
            convolutions (``nn.Conv2d``) and embeddings that it matches. The class of the layer decides between
            :class:`OftLinear`, :class:`OftConv2d` and :class:`OftEmbedding`.
        exclude: Patterns of layers that are left out.
        train: Glob patterns on names of parameters that are trained beside the rotations (a fresh head, biases).
        overrides: Glob pattern on module names -> settings that differ there; the first pattern that matches wins:
            ``{"*down_proj": {block_size: 64}}``.
    """

    include: list[str] | str = field(default_factory=lambda: ["*"])
    exclude: list[str] = field(default_factory=lambda: ["*lm_head*", "*score*", "*classifier*"])
    train: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.include, str):  # one pattern, as PEFT's all-linear
            object.__setattr__(self, "include", [self.include])
        self.variants()  # refuses a bad override now, not when the network is built

    def apply_(self, model: nn.Module) -> list[str]:
        """Freeze ``model`` and wrap the chosen layers in place; the outputs of the model do not change.

        Returns:
            The names of the wrapped layers.

        Raises:
            ConfigurationError: See :func:`orthotrain.layers.replace_linears`; if a pattern matches nothing; or if a new
                head was quantized, so that it cannot be trained.
        """
        fresh, chosen = fresh_parameters(model), self.choose(model)
        dtype, leftover = compute_dtype_of(model), frozen_linears(model, without=set(chosen.values()))

        def wrapped(layer: nn.Module, name: str) -> OftLayer:
            rotated = oft_layer(layer, self.for_name(name), dtype)
            if self.for_name(name).storage in ("int8", "nf4"):
                release(layer)
            return rotated

        model.requires_grad_(False)
        replace_layers(model, chosen, wrapped)
        swap_modules(model, leftover)
        self._train_others(model, fresh)
        warn_of_experts(model)
        return list(chosen)

    def choose(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the layers that :meth:`apply_` wraps, by name; the model is not changed, and needs no storage.

        Raises:
            ConfigurationError: As :meth:`apply_`, except for patterns of ``train``.
        """
        check_excluded(model, self.exclude, type(self)().exclude)
        fresh = fresh_parameters(model)
        exclude = [*self.exclude, *(glob.escape(name.rpartition(".")[0]) for name in fresh)]
        chosen = select_layers(model, self.include, exclude, tuple(OFT_CLASSES))
        self.refuse_unused_overrides(chosen)
        dtype = compute_dtype_of(model)
        check_wrapping(chosen, lambda layer, name: oft_layer(layer, self.for_name(name), dtype), self.for_name)
        return chosen

    def _train_others(self, model: nn.Module, fresh: dict[str, nn.Parameter]) -> None:
        for parameter in fresh.values():
            parameter.requires_grad_(True)
        if fresh:
            rank_zero_info(f"trained in full, as the model's checkpoint does not hold them: {', '.join(fresh)}")
        set_trained("train", self.train, dict(model.named_parameters()), True)


def fresh_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that the model's checkpoint did not hold, by name, as the model builder has noted them.

    Raises:
        ConfigurationError: If one belongs to a quantized layer, naming the parameter.
    """
    names = getattr(model, "fresh_parameters", ())
    fresh = {name: parameter for name, parameter in model.named_parameters() if name in names}
    for name in fresh:
        if is_bitsandbytes(model.get_submodule(name.rpartition(".")[0])):
            raise ConfigurationError(
                f"{name} is not in the model's checkpoint, and its layer is quantized, so it cannot be trained: leave "
                "load_in_4bit at false and set layers.storage, or load a checkpoint that holds it"
            )
    return fresh
