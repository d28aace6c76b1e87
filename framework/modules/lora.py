"""Pretraining with low-rank updates (LoRA, ReLoRA), a baseline with the data, seeds and optimizer of POET."""

from collections.abc import Callable
from dataclasses import dataclass, field

import lightning as L
from torch import nn

from orthotrain.callbacks.merge_rotations import MergeRotations
from orthotrain.errors import check_count
from orthotrain.layers import LoraLinear, select_linears
from orthotrain.layers.replacement import replace_layers
from orthotrain.layers.selection import check_excluded
from orthotrain.models import ModelBuilder
from orthotrain.modules.attached_callbacks import sole_merging
from orthotrain.modules.base import BaseModule
from orthotrain.modules.micro_step import CompileMode
from orthotrain.modules.optimization import Optimization
from orthotrain.seeding import derive_seed


@dataclass(frozen=True)
class LoraLayers:
    """Which linear layers get a low-rank update, and how.

    Args:
        rank: Rank of the update.
        alpha: The factor of the update is ``alpha / rank``; None for a factor of 1.
        include: Glob patterns on module names; each must match a linear layer.
        exclude: Glob patterns of layers that are left out.
    """

    rank: int = 64
    alpha: float | None = None
    include: list[str] = field(default_factory=lambda: ["*"])
    exclude: list[str] = field(default_factory=lambda: ["*lm_head*"])

    def apply_(self, model: nn.Module, seed: int = 0) -> list[str]:
        """Replace the chosen layers of ``model`` in place and return their names.

        Raises:
            ConfigurationError: See :func:`orthotrain.layers.replace_linears`.
        """
        chosen = self.choose(model)

        def wrap(linear: nn.Linear, name: str) -> LoraLinear:
            return LoraLinear.from_linear(linear, self.rank, self.alpha, seed=derive_seed(seed, name))

        replace_layers(model, chosen, wrap)
        return list(chosen)

    def choose(self, model: nn.Module) -> dict[str, nn.Linear]:
        """Return the layers that :meth:`apply_` replaces, by name; the model is not changed, and needs no storage.

        Raises:
            ConfigurationError: See :func:`orthotrain.layers.select_linears`.
        """
        check_excluded(model, self.exclude, type(self)().exclude)
        return select_linears(model, self.include, self.exclude)


class LoraModule(BaseModule):
    """Pretrain a network with frozen linear layers and low-rank updates of their weights.

    Args:
        model: The network, or a callable that builds it.
        layers: Which linear layers get an update, and its rank.
        merge_every: Optimizer steps after which updates are merged and started anew (ReLoRA); None for never.
        optimization: Learning rates, weight decay, optimizer and schedule; ``rotation_lr`` is the learning rate of the
            updates.
        seed: Seed of the initial values of the updates.
        chunked_loss: See :class:`BaseModule`.
        compile: See :class:`BaseModule`.
    """

    def __init__(
        self,
        model: ModelBuilder | nn.Module | Callable[[], nn.Module],
        layers: LoraLayers = LoraLayers(),
        merge_every: int | None = None,
        optimization: Optimization = Optimization(),
        seed: int = 0,
        chunked_loss: bool | None = None,
        compile: CompileMode = "none",
    ) -> None:
        super().__init__(model, optimization, chunked_loss=chunked_loss, compile=compile)
        if merge_every is not None:
            check_count("merge_every", merge_every)
        self.save_hyperparameters("merge_every", "seed")
        self.layers = layers
        self.seed = seed
        self._merging = None if merge_every is None else MergeRotations(merge_every)

    def wrap(self, model: nn.Module) -> None:
        """Replace the chosen linear layers."""
        self.layers.apply_(model, self.seed)

    def check_targets(self, model: nn.Module) -> None:
        """Refuse layers that cannot be replaced; see :class:`LoraLayers`."""
        if type(self).wrap is LoraModule.wrap:
            self.layers.choose(model)

    def configure_callbacks(self) -> list[L.Callback]:
        """Attach the callback that merges, if ``merge_every`` is set."""
        merging = [] if self._merging is None else sole_merging(self._trainer, self._merging)
        return [*super().configure_callbacks(), *merging]
