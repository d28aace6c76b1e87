"""The rotations of both sides of a weight: how they are drawn, and how a weight is permuted and folded with them."""

from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from orthotrain.kernels.fold import fold
from orthotrain.kernels.permutations import ColumnPermutation, RowPermutation
from orthotrain.layers.poet.poet_settings import PoetSettings, Side
from orthotrain.layers.rotation.block_rotation import BlockRotation
from orthotrain.layers.weights.frozen_weight import check_storable
from orthotrain.plugins import create
from orthotrain.seeding import draw_permutation


class Rotations(NamedTuple):
    """The rotation of each side of a weight ``(out, in)``, None for a side that is not rotated."""

    out: BlockRotation | None
    into: BlockRotation | None

    @classmethod
    def draw(cls, linear: nn.Linear, settings: PoetSettings, seed: int) -> Self:
        """Return identity rotations for a linear layer, on its device, with the first permutations.

        Raises:
            ConfigurationError: If no block of the given size fits, or products are not computed in the weight's dtype.
        """
        check_storable(linear.weight)
        parameterization, device = create(settings.used_parameterization), linear.weight.device

        def one(side: Side, width: int) -> BlockRotation | None:
            shape = settings.blocks(side, width)
            if shape is None:
                return None
            permutation = None
            if settings.aligned not in ("both", side):
                group = settings.permuted_together(width, shape[0])
                permutation = draw_permutation(width // group, seed, 0, side).to(device)
            with torch.device(device):
                return BlockRotation(width, shape[0], parameterization, blocks=shape[1], permutation=permutation)

        return cls(one("out", linear.out_features), one("in", linear.in_features))

    @property
    def permutations(self) -> tuple[Tensor | None, Tensor | None]:
        """The permutations of the output and of the input side (:class:`BlockRotation`), None for a side without."""
        out, into = (None if rotation is None else rotation.permutation for rotation in self)
        return out, into

    def displacements(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """Return ``D = R - I`` of the output and of the input side in ``dtype``, None for a side without rotation."""
        out, into = (None if rotation is None else rotation.displacement(dtype) for rotation in self)
        return out, into

    def framed(self, weight: Tensor) -> Tensor:
        """Return ``weight (out, in)`` with its rows and columns permuted into blocks."""
        permutation_out, permutation_in = self.permutations
        if permutation_out is not None:
            rows = RowPermutation(permutation_out, weight.shape[0])
            weight = rows.gather(weight.contiguous(), slice(0, weight.shape[0]))
        if permutation_in is not None:
            weight = ColumnPermutation(permutation_in, weight).gather_into(torch.empty_like(weight), weight)
        return weight

    def fold(self, framed: Tensor, d_out: Tensor | None, d_in: Tensor | None) -> Tensor:
        """Return ``R_out^T W R_in^T (out, in)`` in the natural order, from the result of :meth:`framed`."""
        return fold(framed, d_out, d_in, *self.permutations)
