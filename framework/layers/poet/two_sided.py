"""What the POET layers share: a frozen weight with a learned block rotation on either side."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from orthotrain.devices.host_reads import HostCount
from orthotrain.kernels.fold import fold
from orthotrain.kernels.permutations import ColumnPermutation, RowPermutation
from orthotrain.layers.finite import finite_or
from orthotrain.layers.mergeable import check_stored_counts
from orthotrain.layers.poet.poet_settings import PoetSettings, Side
from orthotrain.layers.poet.trained_scale import TrainedScale
from orthotrain.layers.rotation.block_rotation import BlockRotation
from orthotrain.layers.sharding import whole
from orthotrain.layers.weights.frozen_weight import FrozenWeight, check_storable, plain_linear
from orthotrain.plugins import create
from orthotrain.seeding import draw_permutation


class Rotations(NamedTuple):
    """The rotation of each side of a weight ``(out, in)``, None for a side that is not rotated."""

    out: BlockRotation | None
    into: BlockRotation | None

    @classmethod
    def draw(cls, linear: nn.Linear, settings: PoetSettings, seed: int) -> Self:
        """Return identity rotations for a linear layer on its device, with the permutations of the start.

        Raises:
            ConfigurationError: If no block of the size that is asked for fits, or the weight has no dtype of products.
        """
        check_storable(linear.weight)
        parameterization, device = create(settings.parameterization), linear.weight.device

        def one(side: Side, width: int) -> BlockRotation | None:
            shape = settings.blocks(side, width)
            if shape is None:
                return None
            order = None
            if settings.aligned not in ("both", side):
                group = settings.permuted_together(width, shape[0])
                order = draw_permutation(width // group, seed, 0, side).to(device)
            with torch.device(device):
                return BlockRotation(width, shape[0], parameterization, blocks=shape[1], permutation=order)

        return cls(one("out", linear.out_features), one("in", linear.in_features))

    @property
    def orders(self) -> tuple[Tensor | None, Tensor | None]:
        """The permutations of the rows and of the columns (:class:`BlockRotation`), None for a side without one."""
        out, into = (None if rotation is None else rotation.permutation for rotation in self)
        return out, into

    def displacements(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """Return ``D = R - I`` of the rows and of the columns in ``dtype``, None for a side that is not rotated."""
        out, into = (None if rotation is None else rotation.displacement(dtype) for rotation in self)
        return out, into

    def framed(self, weight: Tensor) -> Tensor:
        """Return ``weight (out, in)`` with rows and columns in the order of the blocks."""
        rows, columns = self.orders
        if rows is not None:
            weight = RowPermutation(rows, weight.shape[0]).gather(weight.contiguous(), slice(0, weight.shape[0]))
        if columns is not None:
            weight = ColumnPermutation(columns, weight).gather_into(torch.empty_like(weight), weight)
        return weight

    def fold(self, framed: Tensor, d_out: Tensor | None, d_in: Tensor | None) -> Tensor:
        """Return ``R_out^T W R_in^T (out, in)`` in the natural order, of ``framed`` in the order of the blocks."""
        return fold(framed, d_out, d_in, *self.orders)


class TwoSided(nn.Module):
    """``W_eff = s R_out^T W R_in^T`` of a frozen weight, folded in fp32; a subclass says how it is multiplied with.

    Args:
        weight: The frozen weight ``(out, in)``; in which order its rows and columns are is up to the subclass.
        bias: ``(out,)`` trained bias, or None. A merge never changes it.
        rotation_in: Rotation of the ``in`` input features, or None.
        rotation_out: Rotation of the ``out`` output features, or None.
        scale: Trained factor s of the weight, which no fold changes, or None for 1.
        seed: Seed of the permutations and of stochastic rounding.
    """

    merge_count: Tensor

    def __init__(
        self,
        weight: FrozenWeight,
        bias: nn.Parameter | None,
        rotation_in: BlockRotation | None,
        rotation_out: BlockRotation | None,
        *,
        scale: TrainedScale | None,
        seed: int,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.weight = weight
        self.bias = bias
        self.rotation_in = rotation_in
        self.rotation_out = rotation_out
        self.scale = scale
        self.seed = seed
        self.register_buffer("merge_count", torch.zeros((), dtype=torch.int64))
        self._merges = HostCount()

    @property
    def rotations(self) -> Rotations:
        """The rotations of both sides."""
        return Rotations(self.rotation_out, self.rotation_in)

    def sides(self) -> Iterator[tuple[Side, BlockRotation]]:
        """Yield name and rotation of the sides that are rotated."""
        if self.rotation_in is not None:
            yield "in", self.rotation_in
        if self.rotation_out is not None:
            yield "out", self.rotation_out

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """Return ``s R_out^T W R_in^T`` ``(out, in)`` in the natural order, rounded to the dtype of products."""
        return self._scaled(self._effective_weight()).to(self.weight.dtype)

    def read_counts(self) -> None:
        """Read the counts of merges and folds from the device, so that no later one waits for them."""
        self._merges.read(self.merge_count)

    def rotation_parameters(self) -> list[nn.Parameter]:
        """Return the generators of the rotated sides."""
        return [rotation.generators for _, rotation in self.sides()]

    def displacements(self) -> list[Tensor]:
        """Return ``D = R - I`` of the rotated sides, ``(n, b, b)`` each."""
        return [rotation.displacement() for _, rotation in self.sides()]

    @torch.no_grad()
    def unwrap(self) -> nn.Linear:
        """Return an ``nn.Linear`` that computes the same, with the merged weight and this layer's bias."""
        return plain_linear(self.merged_weight(), self.bias)

    @torch.no_grad()
    def trained_factor(self) -> float | None:
        """Return s, None for a layer without a trained scale; a collective where it is sharded."""
        return None if self.scale is None else float(whole(self.scale.log).exp())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        check_stored_counts(state_dict, prefix, ("merge_count", "fold_count", "resample_count"))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _scaled(self, tensor: Tensor) -> Tensor:
        return tensor if self.scale is None else self.scale(tensor)

    def _effective_weight(self) -> Tensor:
        """Return ``R_out^T W R_in^T (out, in)`` in the natural order, in fp32 or wider, without a gradient."""
        raise NotImplementedError

    def _finite_weight(self) -> Tensor:
        """Return :meth:`_effective_weight`, looked at before anything is stored.

        Raises:
            TrainingDiverged: If it holds NaN or infinite values (where layers are looked at together: later).
        """
        return finite_or(
            self._effective_weight(),
            lambda: self.rotations.fold(self._exact_weight(), None, None),
            f"the merged weight ({self.out_features} x {self.in_features}) holds NaN or infinite values, and was "
            "not stored; lower the learning rate of the generators, or set max_generator_norm",
        )

    def _exact_weight(self) -> Tensor:
        """Return the frozen weight in fp32 or wider: a fold in 16 bits would move the singular values every time."""
        return self.weight.dequantize(torch.promote_types(self.weight.dtype, torch.float32)).detach()

    def _redraw(self, count: int) -> None:
        """Reset the rotations and take the permutations of period ``count``, the same on every rank."""
        for side, rotation in self.sides():
            if rotation.permutation is None:
                rotation.reset_()
                continue
            rotation.reset_(draw_permutation(rotation.permutation.shape[0], self.seed, count, side))
