"""The POET layer: a frozen weight between two learned block rotations."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from orthotrain.devices.host_reads import HostCount
from orthotrain.errors import check_choice
from orthotrain.kernels.block_rotate import block_rotate
from orthotrain.kernels.operation import without_autocast
from orthotrain.kernels.permutations import by_feature
from orthotrain.kernels.poet_linear import poet_linear, serves
from orthotrain.layers.mergeable import SideCoverage
from orthotrain.layers.poet.poet_settings import PoetSettings, Side
from orthotrain.layers.poet.route_costs import ActivationMode, Centre, Route, choose_route
from orthotrain.layers.poet.trained_scale import TrainedScale
from orthotrain.layers.poet.two_sided import Rotations, TwoSided
from orthotrain.layers.rotation.block_rotation import BlockRotation
from orthotrain.layers.spectrum import singular_values, with_spectrum
from orthotrain.layers.weights.frozen_weight import FrozenWeight
from orthotrain.layers.weights.rounding import Noise
from orthotrain.seeding import draw_permutation, generator


class PoetLinear(TwoSided):
    """``y = s rot_out(rot_in(x) @ W.T) + bias``: POET's ``W_eff = R_out^T W R_in^T`` (arXiv:2506.08001, equation 1).

    The frozen weight is kept in the frame of both permutations, so that the hot path gathers ``x`` once and scatters
    ``y`` once (arXiv:2603.05500, section 3). The bias is added last: a merge never changes it.

    Args:
        weight: The frozen weight ``(out, in)``, rows and columns already in the permuted frame of the rotated sides.
        bias: ``(out,)`` trained bias, or None.
        rotation_in: Rotation of the ``in`` input features, None where only the output side is rotated.
        rotation_out: Rotation of the ``out`` output features, None where only the input side is rotated.
        centre: ``input`` rotates activations, ``weight`` forms the effective weight once per pass, ``auto`` takes the
            cheaper one for the number of tokens at hand (:func:`choose_route`). How the gradients of a rotated weight
            are formed follows from the costs alone.
        activation_mode: ``fast`` saves the activation before the output rotation, ``mem`` recomputes it in backward.
        anchor_every: Merges and folds between restorations of the singular values of the start, 0 for never. One takes
            a decomposition of the weight and undoes what requantising adds up to.
        scale: Trained factor s of the weight, which no merge changes, or None for 1.
        seed: Seed of the permutations; merge k draws them from (seed, k, side).
    """

    spectrum: Tensor | None
    fold_count: Tensor

    def __init__(
        self,
        weight: FrozenWeight,
        bias: nn.Parameter | None,
        rotation_in: BlockRotation | None,
        rotation_out: BlockRotation | None,
        *,
        centre: Centre = "auto",
        activation_mode: ActivationMode = "fast",
        anchor_every: int = 0,
        scale: TrainedScale | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(weight, bias, rotation_in, rotation_out, scale=scale, seed=seed)
        check_choice("centre", centre, Centre)
        check_choice("activation_mode", activation_mode, ActivationMode)
        self.centre = centre
        self.activation_mode = activation_mode
        self.anchor_every = anchor_every
        self.register_buffer("fold_count", torch.zeros((), dtype=torch.int64))
        self._folds = HostCount()
        # filled by the first merge: a decomposition of every layer would slow down the start
        spectrum = torch.zeros(min(weight.out_features, weight.in_features), dtype=torch.float32)
        self.register_buffer("spectrum", spectrum if anchor_every else None)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        block_size: int = 256,
        parameterization: Any = "cayley_neumann",
        *,
        seed: int = 0,
        **settings: Any,
    ) -> Self:
        """Wrap a linear layer without changing its function (but for the rounding of a storage that rounds).

        Args:
            linear: Any ``nn.Linear``; its weight is copied, its bias parameter is taken over.
            block_size: See :class:`PoetSettings`, as for the arguments that follow.
            parameterization: A :class:`Parameterization`, a registered name or its configuration.
            seed: Seed of the permutations.
            settings: Other fields of :class:`PoetSettings` by name.

        Raises:
            ConfigurationError: If a setting does not fit, naming what would work.
        """
        described = PoetSettings(block_size=block_size, parameterization=parameterization, **settings)
        return cls.from_settings(linear, described, seed)

    @classmethod
    def from_settings(cls, linear: nn.Linear, settings: PoetSettings, seed: int = 0) -> Self:
        """Wrap a linear layer as ``settings`` describe; see :meth:`from_linear`."""
        rotations = Rotations.draw(linear, settings, seed)
        framed = rotations.framed(linear.weight.detach())
        if rotations.orders == (None, None):  # what is stored is written into by merges
            framed = framed.clone()
        with torch.device(linear.weight.device):
            return cls(
                settings.freeze(framed),
                linear.bias,
                rotations.into,
                rotations.out,
                centre=settings.centre,
                activation_mode=settings.activation_mode,
                anchor_every=settings.anchor_period,
                scale=settings.scale(),
                seed=seed,
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``; under autocast in its dtype, like nn.Linear."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        d_out, d_in = self.rotations.displacements(x.dtype)
        by = {"input": self._by_input, "product": self._by_product, "contraction": self._by_contraction}
        compute = by[self._route(x)]
        if self.activation_mode == "mem" and torch.is_grad_enabled():
            y = checkpoint(compute, x, d_out, d_in, use_reentrant=False, preserve_rng_state=False)
        else:
            y = compute(x, d_out, d_in)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _by_input(self, x: Tensor, d_out: Tensor | None, d_in: Tensor | None) -> Tensor:
        # Autograd keeps x and the product before the output rotation, nothing else: the
        # frozen product needs only W for its gradient.
        if d_in is not None:
            x = block_rotate(x, d_in, gather=self.rotations.orders[1])
        y = self._scaled(self.weight.matmul(x))
        return y if d_out is None else block_rotate(y, d_out, scatter=self.rotations.orders[0])

    def _by_product(self, x: Tensor, d_out: Tensor | None, d_in: Tensor | None) -> Tensor:
        return F.linear(x, self._scaled(self.rotations.fold(self.weight.dequantize(x.dtype), d_out, d_in)))

    def _by_contraction(self, x: Tensor, d_out: Tensor | None, d_in: Tensor | None) -> Tensor:
        weight = self.weight.dequantize(x.dtype)
        return self._scaled(poet_linear(x, weight, d_out, d_in, *self.rotations.orders))

    def _route(self, x: Tensor) -> Route:
        """Return how to compute for ``x``: by the input, or by the weight with the cheaper route to its gradient."""
        if self.centre == "input":
            return "input"
        routes: tuple[Route, ...] = ("product", "contraction") if serves(x) else ("product",)
        if self.centre == "auto":
            routes = ("input", *routes)
        b_in, b_out = (0 if r is None else r.block_size for r in (self.rotation_in, self.rotation_out))
        tokens = x.numel() // self.in_features
        return choose_route(routes, tokens, self.in_features, self.out_features, b_in, b_out, x.device, x.dtype)

    @torch.no_grad()
    def merge_(self) -> None:
        """Fold the rotations into the frozen weight, reset them and take the next permutations.

        The function of the layer changes by no more than the rounding of the stored weight, and where the spectrum is
        anchored by what earlier roundings have moved it. Every rank draws the same permutations and the same rounding
        bits, from (seed, count).

        Raises:
            TrainingDiverged: If the merged weight would not be finite; the layer stays as it is.
        """
        effective = self._finite_weight()
        self._redraw(self._merges.advance(self.merge_count))
        self._store(effective)

    @torch.no_grad()
    def fold_(self) -> None:
        """Fold the rotations into the frozen weight and reset them; the permutations stay.

        Raises:
            TrainingDiverged: If the folded weight would not be finite; the layer stays as it is.
        """
        effective = self._finite_weight()
        self._folds.advance(self.fold_count)
        for _, rotation in self.sides():
            rotation.reset_()
        self._store(effective)

    def read_counts(self) -> None:
        """Read the counts of merges and folds from the device, so that no later one waits for them."""
        super().read_counts()
        self._folds.read(self.fold_count)

    def _store(self, effective: Tensor) -> None:
        """Store the weight ``(out, in)``, natural frame, as the next of this layer's roundings."""
        count = self._merges.read(self.merge_count) + self._folds.read(self.fold_count)
        if self.spectrum is not None:
            effective = self._anchored(effective, count)
        self.weight.assign_(self.rotations.framed(effective), Noise(self.seed, count, "rounding"))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.spectrum
        super()._apply(fn, recurse)
        if before is not None and self.spectrum is not None and self.spectrum.dtype != before.dtype:
            # in 16 bits the anchor itself would be off by what it is to mend
            self.spectrum = before.to(self.spectrum.device)
        return self

    @torch.no_grad()
    def _effective_weight(self) -> Tensor:
        exact, rotations = self._exact_weight(), self.rotations
        with without_autocast(exact.device.type):
            return rotations.fold(exact, *rotations.displacements(exact.dtype))

    def _anchored(self, effective: Tensor, count: int) -> Tensor:
        assert self.spectrum is not None
        if count == 1:
            self.spectrum.copy_(singular_values(effective))
        elif count % self.anchor_every == 0:
            return with_spectrum(effective, self.spectrum)
        return effective

    def coverage(self, sample: int = 4096) -> dict[str, SideCoverage]:
        """Return how far the rotations have reached since the start, from the permutations drawn so far.

        Args:
            sample: Pairs of coordinates that stand for all.
        """
        with torch.device("cpu"):  # that of the generators, whatever the default device is
            return {side: self._side_coverage(side, rotation, sample) for side, rotation in self.sides()}

    def _side_coverage(self, side: Side, rotation: BlockRotation, sample: int) -> SideCoverage:
        width, size, covered = rotation.features, rotation.block_size, rotation.blocks * rotation.block_size
        first = torch.randint(0, width, (sample,), generator=generator(self.seed, side, "pairs"))
        offset = torch.randint(1, width, (sample,), generator=generator(self.seed, side, "offsets"))
        second = (first + offset) % width
        periods = torch.zeros(width, dtype=torch.int64)
        met = torch.zeros(sample, dtype=torch.bool)
        for count in range(self._merges.read(self.merge_count) + 1):
            place = torch.arange(width)
            if rotation.permutation is not None:
                order = draw_permutation(rotation.permutation.shape[0], self.seed, count, side)
                place = torch.argsort(by_feature(order, width))
            inside, block = place < covered, place // size
            periods += inside
            met |= inside[first] & inside[second] & (block[first] == block[second])
        return SideCoverage(periods, float(met.float().mean()))

    def extra_repr(self) -> str:
        """Describe the modes in one line."""
        anchor = f", anchor_every={self.anchor_every}" if self.anchor_every else ""
        return f"centre={self.centre}, activation_mode={self.activation_mode}, seed={self.seed}{anchor}"
