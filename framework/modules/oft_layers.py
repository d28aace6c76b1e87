"""Which layers of a network OFT rotates, how, and what else is trained."""

import glob
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from orthotrain.errors import ConfigurationError
from orthotrain.layers import OftLinear, replace_linears, select_linears
from orthotrain.layers.checks import check_parameterization
from orthotrain.layers.oft.oft_linear import Quantization
from orthotrain.layers.oft.oft_rotation import RotationDtype
from orthotrain.layers.surgery import check_excluded, check_wrapping, release, swap_modules
from orthotrain.layers.weights.bitsandbytes_linear import compute_dtype_of, is_bitsandbytes
from orthotrain.layers.weights.frozen_linear import frozen_linears
from orthotrain.plugins import Parameterization


@dataclass(frozen=True)
class OftLayers:
    """Which linear layers get a rotation of their input, and how. Everything else is frozen.

    But for what the model's checkpoint did not hold, as :class:`orthotrain.models.PretrainedModel` notes it: a new
    head has random values, so it is trained itself and never wrapped. Quantised layers of bitsandbytes that are not
    chosen become :class:`orthotrain.layers.FrozenLinear`.

    Args:
        block_size: Size of the rotated blocks; must divide the input width of every layer.
        block_sizes: Glob pattern on module names -> block size instead of ``block_size``, the first that matches wins.
        parameterization: How generators become rotations: a registered name (`orthotrain plugins` lists them) or a
            class with its arguments, in YAML ``{class_path: CayleyNeumann, init_args: {order: 4}}``.
        include: Glob patterns on module names; each must match a linear layer.
        exclude: Glob patterns taken out again.
        train: Glob patterns on names of parameters that are trained beside the rotations (a fresh head, biases).
        quantization: Storage of the frozen weights: ``nf4``, ``int8``, or null for the one they have.
        group_size: Values that share a scale of ``quantization``; null for 64 (nf4), or 256 (int8, where 256 does not
            divide a width the largest power of two that does, at least 32).
        block_share: Whether all blocks of a layer share one block's generators.
        coft_eps: COFT: bound of the generators' norm in a layer, kept by projection after each step; null for none.
        block_dropout: Probability with which a block is the identity for one training forward.
        rotation_dtype: ``input`` rotates in the dtype of the activations, ``float32`` in fp32.
    """

    block_size: int = 32
    block_sizes: dict[str, int] | None = None
    parameterization: Parameterization | str = "cayley_neumann"
    include: list[str] = field(default_factory=lambda: ["*"])
    exclude: list[str] = field(default_factory=lambda: ["*lm_head*", "*score*", "*classifier*"])
    train: list[str] = field(default_factory=list)
    quantization: Quantization | None = None
    group_size: int | None = None
    block_share: bool = False
    coft_eps: float | None = None
    block_dropout: float = 0.0
    rotation_dtype: RotationDtype = "input"

    def __post_init__(self) -> None:
        check_parameterization(self.parameterization)
        if self.group_size is not None and self.quantization is None:
            raise ConfigurationError(f"group_size={self.group_size!r} without quantization: set that to nf4 or int8")

    def apply_(self, model: nn.Module) -> list[str]:
        """Freeze ``model`` and wrap the chosen layers in place; its outputs stay what they are.

        Returns:
            The names of the wrapped layers.

        Raises:
            ConfigurationError: See :func:`orthotrain.layers.replace_linears`; if a pattern matches nothing; or if a new
                head was quantised, so that it cannot be trained.
        """
        check_excluded(model, self.exclude, type(self)().exclude)
        fresh = fresh_parameters(model)
        exclude = [*self.exclude, *(glob.escape(name.rpartition(".")[0]) for name in fresh)]
        chosen = select_linears(model, self.include, exclude)
        names = {linear: name for name, linear in chosen.items()}
        for pattern in self.block_sizes or {}:
            if not any(fnmatchcase(name, pattern) for name in names.values()):
                raise ConfigurationError(f"block_sizes pattern {pattern!r} matches none of the chosen layers")
        dtype, leftover = compute_dtype_of(model), frozen_linears(model, without=names)
        check_wrapping(chosen, lambda linear, name: self._wrap(linear, name, dtype))
        model.requires_grad_(False)

        def factory(linear: nn.Linear) -> OftLinear:
            layer = self._wrap(linear, names[linear], dtype)
            if self.quantization is not None:
                release(linear)
            return layer

        wrapped = replace_linears(model, self.include, exclude, factory)
        swap_modules(model, leftover)
        _tell_of_experts(model)
        self._train_others(model, fresh)
        return wrapped

    def _train_others(self, model: nn.Module, fresh: dict[str, nn.Parameter]) -> None:
        for parameter in fresh.values():
            parameter.requires_grad_(True)
        if fresh:
            rank_zero_info(f"trained in full, as the model's checkpoint does not hold them: {', '.join(fresh)}")
        for pattern in self.train:
            matches = [p for name, p in model.named_parameters() if fnmatchcase(name, pattern)]
            if not matches:
                raise ConfigurationError(f"train pattern {pattern!r} matches no parameter of the model")
            for parameter in matches:
                parameter.requires_grad_(True)

    def _wrap(self, linear: nn.Linear, name: str, dtype: torch.dtype | None) -> OftLinear:
        sizes = [size for pattern, size in (self.block_sizes or {}).items() if fnmatchcase(name, pattern)]
        return OftLinear.from_linear(
            linear,
            sizes[0] if sizes else self.block_size,
            self.parameterization,
            block_share=self.block_share,
            coft_eps=self.coft_eps,
            block_dropout=self.block_dropout,
            rotation_dtype=self.rotation_dtype,
            quantization=self.quantization,
            group_size=self.group_size,
            compute_dtype=dtype,
        )


def fresh_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that the model's checkpoint did not hold, by name; none where nobody took note.

    Raises:
        ConfigurationError: If one belongs to a quantised layer, naming it.
    """
    names = getattr(model, "fresh_parameters", ())
    fresh = {name: parameter for name, parameter in model.named_parameters() if name in names}
    for name in fresh:
        if is_bitsandbytes(model.get_submodule(name.rpartition(".")[0])):
            raise ConfigurationError(
                f"{name} is not in the model's checkpoint, and its layer is quantised, so it cannot be trained: leave "
                "load_in_4bit at false and set quantization, or load a checkpoint that holds it"
            )
    return fresh


def _tell_of_experts(model: nn.Module) -> None:
    stacks = [
        f"{module_name}.{name}"
        for module_name, module in model.named_modules()
        if not isinstance(module, nn.modules.conv._ConvNd)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and parameter.shape[0] > 1
    ]
    if stacks:
        rank_zero_warn(
            f"{len(stacks)} parameters are stacks of matrices (experts), such as {stacks[0]}: they are no linear "
            "layers, so they are not rotated and stay frozen"
        )
