"""Pretraining with low-rank updates (LoRA, ReLoRA): a baseline on the same data, seeds and optimizer as POET."""

from collections.abc import Callable
from dataclasses import dataclass, field

import lightning as L
from torch import nn

from orthotrain.callbacks.merge_rotations import MergeRotations
from orthotrain.errors import check_count
from orthotrain.layers import LoraLinear, replace_linears, select_linears
from orthotrain.layers.surgery import check_excluded
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
        alpha: Its factor is ``alpha / rank``; None for a factor of 1.
        include: Glob patterns on module names; each must match a linear layer.
        exclude: Glob patterns taken out again.
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
        check_excluded(model, self.exclude, type(self)().exclude)
        names = {linear: name for name, linear in select_linears(model, self.include, self.exclude).items()}

        def factory(linear: nn.Linear) -> LoraLinear:
            return LoraLinear.from_linear(linear, self.rank, self.alpha, seed=derive_seed(seed, names[linear]))

        return replace_linears(model, self.include, self.exclude, factory)


class LoraModule(BaseModule):
    """Pretrain a network whose linear layers are frozen but for low-rank updates.

    Args:
        model: The network, or what builds it.
        layers: Which linear layers, and the rank.
        merge_every: Optimizer steps after which updates are merged and started anew (ReLoRA); None for never.
        optimization: Learning rates, weight decay, optimizer and schedule; ``rotation_lr`` is that of the updates.
        seed: Seed of the updates' first values.
        chunked_loss: Whether the loss goes without whole logits, see :class:`BaseModule`.
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

    def configure_callbacks(self) -> list[L.Callback]:
        """Attach the merging, if there is any."""
        merging = [] if self._merging is None else sole_merging(self._trainer, self._merging)
        return [*super().configure_callbacks(), *merging]
