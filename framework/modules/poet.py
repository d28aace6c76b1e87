"""POET pretraining (arXiv:2506.08001) as a LightningModule around any network."""

from collections.abc import Callable
from dataclasses import dataclass, field

import lightning as L
from torch import nn

from orthotrain.callbacks.merge_rotations import MergeRotations
from orthotrain.callbacks.orthogonality_monitor import OrthogonalityMonitor
from orthotrain.errors import check_choice
from orthotrain.layers import PoetLinear, initialize_, replace_linears, select_linears
from orthotrain.layers.centre import ActivationMode, Centre
from orthotrain.layers.initialization import Initialization
from orthotrain.models import ModelBuilder
from orthotrain.modules.base import BaseModule
from orthotrain.modules.optimization import Optimization
from orthotrain.modules.specification import check_parameterization
from orthotrain.plugins import Parameterization
from orthotrain.seeding import derive_seed, generator


@dataclass(frozen=True)
class PoetLayers:
    """Which linear layers become POET layers, and how.

    Args:
        block_size: Size of the rotated blocks on both sides of every layer.
        parameterization: How generators become rotations: a registered name (`orthotrain plugins` lists them) or a
            class with its arguments, in YAML ``{class_path: CayleyNeumann, init_args: {order: 4}}``.
        include: Glob patterns on module names; each must match a linear layer.
        exclude: Glob patterns taken out again. The output head is trained directly, as in the paper.
        init: Frozen values: ``normalized`` (rows of norm 1, the paper's best) and ``standard`` (deviation 0.02) draw
            new ones, ``keep`` takes those of the network (for pretrained weights).
        centre: ``input``, ``weight``, or ``auto`` for the cheaper one in each layer.
        activation_mode: ``fast`` keeps one activation more in each layer, ``mem`` recomputes it in backward.
    """

    block_size: int = 256
    parameterization: Parameterization | str = "cayley_neumann"
    include: list[str] = field(default_factory=lambda: ["*"])
    exclude: list[str] = field(default_factory=lambda: ["*lm_head*"])
    init: Initialization = "normalized"
    centre: Centre = "auto"
    activation_mode: ActivationMode = "fast"

    def __post_init__(self) -> None:
        check_choice("init", self.init, Initialization)
        check_choice("centre", self.centre, Centre)
        check_choice("activation_mode", self.activation_mode, ActivationMode)
        check_parameterization(self.parameterization)

    def apply_(self, model: nn.Module, seed: int = 0) -> list[str]:
        """Replace the chosen layers of ``model`` in place.

        Values and permutations come from (seed, layer name): they are the same on every rank.

        Returns:
            The names of the replaced layers.

        Raises:
            ConfigurationError: See :func:`orthotrain.layers.replace_linears`.
        """
        names = {linear: name for name, linear in select_linears(model, self.include, self.exclude).items()}

        def factory(linear: nn.Linear) -> PoetLinear:
            name = names[linear]
            initialize_(linear.weight, self.init, generator(seed, name, "frozen weight"))
            return PoetLinear.from_linear(
                linear,
                self.block_size,
                self.parameterization,
                centre=self.centre,
                activation_mode=self.activation_mode,
                seed=derive_seed(seed, name),
            )

        return replace_linears(model, self.include, self.exclude, factory)


class PoetModule(BaseModule):
    """Pretrain any network with POET: rotations of its frozen linear layers, everything else trained directly.

    Subclass it and override :meth:`loss` for another objective.

    Args:
        model: The network, or what builds it.
        layers: Which linear layers are rotated, and how.
        merge_every: Optimizer steps between merges, T_m. The callback that merges is attached by the module.
        max_generator_norm: Merge a layer early when a block's generators are longer than this; None for never. See
            :class:`MergeRotations`.
        optimization: Learning rates, weight decay, optimizer and schedule.
        seed: Seed of frozen values and permutations.

    Raises:
        ConfigurationError: If ``merge_every`` is below 1; when the network is built, if a layer cannot be wrapped.
    """

    def __init__(
        self,
        model: ModelBuilder | nn.Module | Callable[[], nn.Module],
        layers: PoetLayers = PoetLayers(),
        merge_every: int = 400,
        max_generator_norm: float | None = None,
        optimization: Optimization = Optimization(),
        seed: int = 0,
    ) -> None:
        super().__init__(model, optimization)
        self.save_hyperparameters("merge_every", "max_generator_norm", "seed")
        self.layers = layers
        self.merge_every = merge_every
        self.max_generator_norm = max_generator_norm
        self.seed = seed
        self.wrapped_names: list[str] = []
        MergeRotations(merge_every, max_generator_norm)  # refuses a bad value now, not when the trainer starts

    def wrap(self, model: nn.Module) -> None:
        """Replace the chosen linear layers by POET layers."""
        self.wrapped_names = self.layers.apply_(model, self.seed)

    def configure_callbacks(self) -> list[L.Callback]:
        """Attach the merging: a POET run cannot forget it."""
        return [
            *super().configure_callbacks(),
            MergeRotations(self.merge_every, self.max_generator_norm),
            OrthogonalityMonitor(),
        ]
