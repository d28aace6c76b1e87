"""The base of the POET layers: a frozen weight with a learned block rotation on either side."""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from orthotrain.devices.host_reads import HostCount
from orthotrain.kernels.operation import without_autocast
from orthotrain.layers.finite_checks import finite_or_zero
from orthotrain.layers.linear_kinds import check_wrappable
from orthotrain.layers.poet.poet_settings import Aligned, PoetSettings, Side, Sides
from orthotrain.layers.poet.rotations import Rotations
from orthotrain.layers.poet.route_costs import ActivationMode, RouteChoice
from orthotrain.layers.poet.trained_scale import TrainedScale
from orthotrain.layers.protocols import check_stored_counts
from orthotrain.layers.rotation.block_rotation import BlockRotation
from orthotrain.layers.sharding import whole
from orthotrain.layers.weights.frozen_weight import FrozenWeight, plain_linear
from orthotrain.layers.weights.rounding import Noise
from orthotrain.layers.weights.storage import Storage, store
from orthotrain.plugins import Parameterization
from orthotrain.seeding import draw_permutation


class TwoSided(nn.Module):
    """``W_eff = s R_out^T W R_in^T`` of a frozen weight. A subclass says how activations are multiplied with it.

    Args:
        weight: The frozen weight ``(out, in)``, in the frame that the subclass stores it in.
        bias: ``(out,)`` trained bias, or None. The bias is added last, so that a merge never changes it.
        rotations: Rotations of the ``out`` output and the ``in`` input features, None for a side that is not rotated.
        settings: The settings of the layer. ``trained_scale`` adds the trained factor s, which no merge changes.
        seed: Seed of the permutations and of stochastic rounding; merge k draws permutations from (seed, k, side).

    Attributes:
        merge_count: Number of merges.
        fold_count: Number of folds that were no merge: the permutations stayed.
    """

    stepwise: ClassVar[bool]
    """Whether the layer is folded at every step and stores its weight in the natural order, or permuted into blocks."""
    merge_count: Tensor
    fold_count: Tensor

    def __init__(
        self, weight: FrozenWeight, bias: nn.Parameter | None, rotations: Rotations, settings: PoetSettings, seed: int
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.weight = weight
        self.bias = bias
        self.rotation_in = rotations.into
        self.rotation_out = rotations.out
        self.route = settings.route
        self.scale = TrainedScale() if settings.trained_scale else None
        self.seed = seed
        for _, rotation in self.sides():
            rotation.known_identity = self.stepwise
        self.register_buffer("merge_count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("fold_count", torch.zeros((), dtype=torch.int64))
        self._merges, self._folds = HostCount(), HostCount()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        block_size: int = 256,
        parameterization: Parameterization | str | None = None,
        *,
        fraction: float | None = None,
        block_size_out: int | None = None,
        fraction_out: float | None = None,
        sides: Sides = "both",
        aligned: Aligned = "none",
        permutation_group: int | None = None,
        storage: Storage = "dense",
        group_size: int | None = None,
        anchor_every: int | None = None,
        trained_scale: bool = False,
        route: RouteChoice = "auto",
        activation_mode: ActivationMode = "fast",
        seed: int = 0,
    ) -> Self:
        """Wrap a linear layer without changing its function, except for the rounding of a storage that rounds.

        Args:
            linear: Any ``nn.Linear``. Its weight is copied; its bias parameter becomes the bias of the new layer.
            block_size: See :class:`PoetSettings`, as for all options but ``seed``.
            parameterization: A :class:`Parameterization`, a registered name or its configuration.
            fraction: Part of the features in one block, in place of ``block_size``.
            block_size_out: Block size of the output side.
            fraction_out: Fraction of the output side.
            sides: Sides that are rotated.
            aligned: Sides without permutation.
            permutation_group: Features that permutations move together.
            storage: Format of the frozen weight.
            group_size: Values that share a scale in ``int8`` and ``nf4``.
            anchor_every: Merges between restorations of the singular values.
            trained_scale: Whether the weight has a trained factor.
            route: Whether activations or the weight are rotated.
            activation_mode: Whether an activation is kept or recomputed.
            seed: Seed of permutations and stochastic rounding.

        Raises:
            ConfigurationError: If an option does not fit the layer, naming values that would work; or if the layer has
                a hook or may compute something else.
        """
        given = locals()
        options = {field.name: given[field.name] for field in fields(PoetSettings) if field.name in given}
        return cls.from_settings(linear, PoetSettings(**options, stepwise=cls.stepwise), seed)

    @classmethod
    def from_settings(cls, linear: nn.Linear, settings: PoetSettings, seed: int = 0) -> Self:
        """Wrap a linear layer as ``settings`` describe; see :meth:`from_linear`."""
        check_wrappable(linear)
        rotations, values = Rotations.draw(linear, settings, seed), linear.weight.detach()
        with torch.device(linear.weight.device):
            framed = cls._frame(rotations, values)
            # merges write into the stored tensor, which must not be the caller's
            stored = store(values.clone() if framed is values else framed, settings.storage, settings.group_size)
            return cls(stored, linear.bias, rotations, settings, seed)

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
    def merge_(self) -> None:
        """Fold the rotations into the frozen weight, reset them and draw the next permutations.

        The function of the layer changes by no more than the rounding of the stored weight, and the correction of the
        singular values where ``anchor_every`` is set. Every rank draws the same permutations and rounds to the same
        bits, from (seed, count).

        Raises:
            TrainingDiverged: If the rotations are not finite; the layer stays as it is. On a device, the callback's
                checks raise the error one step later.
        """
        effective = self._effective_weight(check=True)
        count = self._merges.advance(self.merge_count)
        for side, rotation in self.sides():
            permutation = rotation.permutation
            rotation.reset_(None if permutation is None else draw_permutation(len(permutation), self.seed, count, side))
        self._store(effective)

    @torch.no_grad()
    def fold_(self) -> None:
        """Fold the rotations into the frozen weight and reset them; the permutations stay. Errors as :meth:`merge_`."""
        effective = self._effective_weight(check=True)
        self._folds.advance(self.fold_count)
        for _, rotation in self.sides():
            rotation.reset_()
        self._store(effective)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """Return ``s R_out^T W R_in^T`` ``(out, in)`` in the natural order, rounded to the dtype of products."""
        return self._scaled(self._effective_weight()).to(self.weight.dtype)

    def read_counts(self) -> None:
        """Read the counts of merges and folds from the device, so that the next ones do not make the host wait."""
        self._merges.read(self.merge_count)
        self._folds.read(self.fold_count)

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
        check_stored_counts(state_dict, prefix, ("merge_count", "fold_count"))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _scaled(self, tensor: Tensor, last: bool = False) -> Tensor:
        return tensor if self.scale is None else self.scale(tensor, last)

    @torch.no_grad()
    def _effective_weight(self, check: bool = False) -> Tensor:
        """Return ``R_out^T W R_in^T (out, in)`` in the natural order, in fp32 or wider.

        Raises:
            TrainingDiverged: With ``check``, if a rotation holds NaN, infinite or huge values (:func:`finite_or_zero`).
        """
        weight, rotations = self._exact_weight(), self.rotations
        if self.stepwise:  # only rotations that have moved: where the sides take turns, a fold is half the work
            rotations = Rotations(*(r if r is not None and r.moved() else None for r in rotations))
            weight = rotations.framed(weight)
        if rotations == (None, None):
            return weight
        with without_autocast(weight.device.type):
            displacements = rotations.displacements(weight.dtype)
            if check:
                displacements = finite_or_zero(displacements, self._not_finite)
            return rotations.fold(weight, *displacements)

    def _exact_weight(self) -> Tensor:
        """Return the frozen weight in fp32 or wider: a fold in 16 bits would move the singular values each time."""
        return self.weight.dequantize(torch.promote_types(self.weight.dtype, torch.float32)).detach()

    def _not_finite(self) -> str:
        return (
            f"the rotations of a weight ({self.out_features} x {self.in_features}) hold NaN, infinite or huge values, "
            "and were not folded; lower the learning rate of the generators, or set max_generator_norm"
        )

    def _store(self, effective: Tensor) -> None:
        """Store the weight ``(out, in)``, given in the natural order, with the rounding noise of this merge or fold."""
        count = self._merges.read(self.merge_count) + self._folds.read(self.fold_count)
        self.weight.assign_(self._frame(self.rotations, effective), Noise(self.seed, count, "rounding"))

    @classmethod
    def _frame(cls, rotations: Rotations, weight: Tensor) -> Tensor:
        """Return ``weight (out, in)``, given in the natural order, in the frame that the layer stores."""
        return weight if cls.stepwise else rotations.framed(weight)
