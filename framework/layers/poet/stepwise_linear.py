"""The POET layer whose rotations are folded after every step: while a batch is processed it is a plain product."""

from typing import Literal, Self

import torch
from torch import Tensor, nn

from orthotrain.devices.host_reads import HostCount, read_waits
from orthotrain.errors import ConfigurationError, TrainingDiverged
from orthotrain.kernels.operation import without_autocast
from orthotrain.kernels.tangent import tangent, tangent_linear
from orthotrain.layers.finite import is_sound
from orthotrain.layers.poet.poet_settings import TOO_COARSE, PoetSettings
from orthotrain.layers.poet.route_costs import costs_for
from orthotrain.layers.poet.trained_scale import TrainedScale
from orthotrain.layers.poet.two_sided import Rotations, TwoSided
from orthotrain.layers.rotation.block_rotation import BlockRotation
from orthotrain.layers.rotation.generators import mark_zero
from orthotrain.layers.weights.bf16_weight import Bf16Weight
from orthotrain.layers.weights.frozen_weight import DenseWeight, FrozenWeight
from orthotrain.layers.weights.rounding import Noise


class StepwiseLinear(TwoSided):
    """``y = x @ W.T + bias`` with trained rotations of W that are known to be the identity in every forward pass.

    ``W_eff = s R_out^T W R_in^T`` as in :class:`PoetLinear`, but the optimizer's step is folded at once
    (``MergeRotations(every_n_steps=1)``), so that R = I between steps and only the gradient at the identity is needed
    (kernels/tangent/README.md). The frozen weight stays in the natural frame; the permutations say which coordinates
    share a block and last until a merge draws the next ones.

    Args:
        weight: The frozen weight ``(out, in)``, natural frame.
        bias: ``(out,)`` trained bias, or None.
        rotation_in: Rotation of the input features, or None.
        rotation_out: Rotation of the output features, or None.
        centre: ``input`` forms the gradient from activations, ``weight`` from dL/dW, ``auto`` takes the one that the
            table of costs makes cheaper (:mod:`orthotrain.layers.poet.route_costs`). From dL/dW, a weight that is not
            dense is unpacked once, and what is unpacked is kept until backward; in 16 bits a bf16 weight is what it
            stores.
        scale: Trained factor s of the weight, which no fold changes, or None for 1.
        seed: Seed of the permutations and of stochastic rounding.
    """

    resample_count: Tensor

    def __init__(
        self,
        weight: FrozenWeight,
        bias: nn.Parameter | None,
        rotation_in: BlockRotation | None,
        rotation_out: BlockRotation | None,
        *,
        centre: Literal["auto", "input", "weight"] = "auto",
        scale: TrainedScale | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(weight, bias, rotation_in, rotation_out, scale=scale, seed=seed)
        self.centre = centre
        for _, rotation in self.sides():
            rotation.known_identity = True
        self.register_buffer("resample_count", torch.zeros((), dtype=torch.int64))
        self._resamples = HostCount()

    @classmethod
    def from_settings(cls, linear: nn.Linear, settings: PoetSettings, seed: int = 0) -> Self:
        """Wrap a linear layer without changing its function; its bias parameter is taken over.

        Raises:
            ConfigurationError: If a setting does not fit, naming what would work.
        """
        rotations = Rotations.draw(linear, settings, seed)
        with torch.device(linear.weight.device):
            weight = settings.freeze(linear.weight.detach().clone())
            scale = settings.scale()
            return cls(
                weight, linear.bias, rotations.into, rotations.out, centre=settings.centre, scale=scale, seed=seed
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``; under autocast in its dtype, like nn.Linear."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if not torch.is_grad_enabled():  # training mode or not: every ordinary layer has gradients in both
            y = self._scaled(self.weight.matmul(x))
        elif self._centre_for(x) == "weight":
            y = self._through_weight(x)
        else:
            y = self._scaled(self.weight.matmul(self._tapped(x, self.rotation_in)))
            y = self._tapped(y, self.rotation_out)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _tapped(self, x: Tensor, rotation: BlockRotation | None) -> Tensor:
        if rotation is None:
            return x
        return tangent(x, rotation.generators, rotation.permutation, rotation.block_size)

    def _through_weight(self, x: Tensor) -> Tensor:
        out, into = self.rotation_out, self.rotation_in
        # a dense weight is cast for each product, so that what is kept for backward is the parameter itself
        dtype = None if isinstance(self.weight, DenseWeight) else x.dtype
        with without_autocast(x.device.type):
            return tangent_linear(
                x,
                self.weight.dequantize(dtype),
                None if out is None else out.generators,
                None if into is None else into.generators,
                *self.rotations.orders,
                (0 if out is None else out.block_size, 0 if into is None else into.block_size),
                None if self.scale is None else self.scale.log,
            )

    def _centre_for(self, x: Tensor) -> Literal["input", "weight"]:
        if self.centre != "auto":
            return self.centre
        sides = tuple((r.blocks * r.block_size, r.block_size) for _, r in self.sides())
        per_token, once = advantage(self.in_features, self.out_features, sides, x.device, x.dtype)
        return "input" if per_token * (x.numel() // self.in_features) + once >= 0 else "weight"

    @torch.no_grad()
    def fold_(self) -> None:
        """Fold the rotations into the frozen weight and reset them; the permutations stay.

        Every rank rounds alike, from (seed, count). The host does not wait for a device to learn whether the rotations
        are finite. A side that is not finite is left out there: the weight stays as it is, and the generators of the
        side become NaN, for ``FiniteGuard`` to find.

        Raises:
            TrainingDiverged: On a CPU, if the rotations are not finite; the layer stays as it is.
        """
        left_out = self._store_folded()
        for _, rotation in self.sides():
            rotation.reset_()
        self._spoil(left_out)

    @torch.no_grad()
    def merge_(self) -> None:
        """Fold as :meth:`fold_` does, and draw the next permutations, from (seed, count)."""
        left_out = self._store_folded()
        self._redraw(self._resamples.advance(self.resample_count))
        self._spoil(left_out)

    def _store_folded(self) -> list[tuple[BlockRotation, Tensor]]:
        """Store the weight with its rotations; return the rotations with whether each was left out, a bool ``()``."""
        exact, moved = self._exact_weight(), self._moved()
        with without_autocast(exact.device.type):
            displacements = moved.displacements(exact.dtype)
        left_out = [None if d is None else ~is_sound(d) for d in displacements]
        if not read_waits(exact.device) and any(bool(out) for out in left_out if out is not None):
            raise TrainingDiverged(
                f"the rotations of a weight ({self.out_features} x {self.in_features}) hold NaN, infinite or huge "
                "values, and were not folded; lower the learning rate of the generators"
            )
        sides = zip(displacements, left_out, strict=True)
        used = (None if d is None or out is None else d.masked_fill(out, 0) for d, out in sides)
        effective = self._rotated(exact, moved, *used)
        self.weight.assign_(effective, Noise(self.seed, self._merges.advance(self.merge_count), "rounding"))
        return [(r, out) for r, out in zip(moved, left_out, strict=True) if r is not None and out is not None]

    def _spoil(self, left_out: list[tuple[BlockRotation, Tensor]]) -> None:
        """Set the generators of the sides that were left out to NaN; on a CPU there is none."""
        for rotation, out in left_out:
            if read_waits(out.device):
                rotation.generators.masked_fill_(out, torch.nan)
                # NaN is left out of the next fold like a side that rests: the guard has looked by then
                mark_zero(rotation.generators)

    @torch.no_grad()
    def _effective_weight(self) -> Tensor:
        exact, moved = self._exact_weight(), self._moved()
        with without_autocast(exact.device.type):
            return self._rotated(exact, moved, *moved.displacements(exact.dtype))

    def _rotated(self, exact: Tensor, moved: Rotations, d_out: Tensor | None, d_in: Tensor | None) -> Tensor:
        if moved == (None, None):
            return exact
        with without_autocast(exact.device.type):
            return moved.fold(moved.framed(exact), d_out, d_in)

    def read_counts(self) -> None:
        """Read the counts of folds and merges from the device, so that no later one waits for them."""
        super().read_counts()
        self._resamples.read(self.resample_count)

    def _moved(self) -> Rotations:
        """Return the rotations that are not the identity: sides that take turns halve the work of a fold."""
        return Rotations(*(r if r is not None and r.moved() else None for r in self.rotations))

    @torch.no_grad()
    def movement(self) -> Tensor:
        """Return the root mean square of what a fold would change over that of the weight, a scalar in fp32."""
        exact = self._exact_weight()
        return (self._effective_weight() - exact).norm() / exact.norm().clamp_min(1e-30)

    def check_storage(self, name: str) -> None:
        """Refuse a weight in 16 bits without a residual: a network may have been cast since its layers were made.

        Raises:
            ConfigurationError: With the ``name`` of the layer and what would work.
        """
        rounded = isinstance(self.weight, Bf16Weight) and not self.weight.carries_residual
        if rounded or (isinstance(self.weight, DenseWeight) and self.weight.dtype.itemsize < 4):
            raise ConfigurationError(f"{name}: stepwise with a weight in {self.weight.dtype}: {TOO_COARSE}")

    def extra_repr(self) -> str:
        """Describe the modes in one line."""
        return f"centre={self.centre}, seed={self.seed}"


# torch.compile shall see two constants, not how a table is read
@torch.compiler.assume_constant_result
def advantage(
    d_in: int, d_out: int, sides: tuple[tuple[int, int], ...], device: torch.device, dtype: torch.dtype
) -> tuple[float, float]:
    """Return by how many nanoseconds the gradient from activations is cheaper: per token, and apart from that.

    It has no product for dL/dW. Its contraction reads what the backward pass of a rotation reads for the displacement,
    about half of what a rotation costs in all; so does that of dL/dW beside a fold.

    Args:
        d_in: Width of the input.
        d_out: Width of the output.
        sides: Features in blocks and size of a block, of each rotated side.
        device: Where the layer computes.
        dtype: What it computes in.
    """
    costs = costs_for(device.type, device.index, dtype.itemsize < 4)
    contracted = sum(costs.rotation(covered, size) - costs.rotate_call for covered, size in sides) / 2
    folded = costs.fold(d_in * d_out, sum(size for _, size in sides))
    return costs.multiply_add * d_in * d_out - contracted, (folded - len(sides) * costs.rotate_call) / 2
