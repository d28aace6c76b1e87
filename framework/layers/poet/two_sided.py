"""The base of the POET layers: a frozen weight with a learned block rotation on either side."""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from orthotrain.devices.host_reads import HostCount
from orthotrain.errors import check_choice
from orthotrain.kernels.operation import without_autocast
from orthotrain.layers.finite import finite_or_zero
from orthotrain.layers.mergeable import check_stored_counts
from orthotrain.layers.poet.poet_settings import Aligned, PoetSettings, Side, Sides
from orthotrain.layers.poet.rotations import Rotations
from orthotrain.layers.poet.route_costs import ActivationMode, RouteChoice
from orthotrain.layers.poet.trained_scale import TrainedScale
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
        rotation_in: Rotation of the ``in`` input features, or None.
        rotation_out: Rotation of the ``out`` output features, or None.
        route: See :class:`PoetSettings`.
        scale: Trained factor s of the weight, which no merge changes, or None for 1.
        seed: Seed of the permutations and of stochastic rounding; merge k draws permutations from (seed, k, side).

    Attributes:
        merge_count: Number of merges.
        fold_count: Number of folds that were no merge: the permutations stayed.
    """

    stepwise: ClassVar[bool]
    merge_count: Tensor
    fold_count: Tensor

    def __init__(
        self,
        weight: FrozenWeight,
        bias: nn.Parameter | None,
        rotation_in: BlockRotation | None,
        rotation_out: BlockRotation | None,
        *,
        route: RouteChoice = "auto",
        scale: TrainedScale | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_choice("route", route, RouteChoice)
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.weight = weight
        self.bias = bias
        self.rotation_in = rotation_in
        self.rotation_out = rotation_out
        self.route = route
        self.scale = scale
        self.seed = seed
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
            ConfigurationError: If an option does not fit the layer, naming values that would work.
        """
        given = locals()
        options = {field.name: given[field.name] for field in fields(PoetSettings) if field.name in given}
        return cls.from_settings(linear, PoetSettings(**options, stepwise=cls.stepwise), seed)

    @classmethod
    def from_settings(cls, linear: nn.Linear, settings: PoetSettings, seed: int = 0) -> Self:
        """Wrap a linear layer as ``settings`` describe; see :meth:`from_linear`."""
        rotations, values = Rotations.draw(linear, settings, seed), linear.weight.detach()
        with torch.device(linear.weight.device):
            framed = cls._frame(rotations, values)
            # merges write into the stored tensor, which must not be the caller's
            stored = store(values.clone() if framed is values else framed, settings.storage, settings.group_size)
            scale = TrainedScale() if settings.trained_scale else None
            options = {"route": settings.route, "scale": scale, "seed": seed, **cls._options(settings)}
            return cls(stored, linear.bias, rotations.into, rotations.out, **options)

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
        effective = self._finite_weight()
        count = self._merges.advance(self.merge_count)
        for side, rotation in self.sides():
            permutation = rotation.permutation
            rotation.reset_(None if permutation is None else draw_permutation(len(permutation), self.seed, count, side))
        self._store(effective)

    @torch.no_grad()
    def fold_(self) -> None:
        """Fold the rotations into the frozen weight and reset them; the permutations stay. Errors as :meth:`merge_`."""
        effective = self._finite_weight()
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

    def _scaled(self, tensor: Tensor) -> Tensor:
        return tensor if self.scale is None else self.scale(tensor)

    def _effective_weight(self) -> Tensor:
        """Return ``R_out^T W R_in^T (out, in)`` in the natural order, in fp32 or wider."""
        return self._folded_weight(guarded=False)

    def _finite_weight(self) -> Tensor:
        """Return :meth:`_effective_weight` for :meth:`merge_` and :meth:`fold_`, after a check of the rotations.

        Raises:
            TrainingDiverged: If a rotation holds NaN, infinite or huge values (:func:`finite_or_zero` says when).
        """
        return self._folded_weight(guarded=True)

    @torch.no_grad()
    def _folded_weight(self, guarded: bool) -> Tensor:
        exact, rotations = self._exact_weight(), self._rotations_to_fold()
        with without_autocast(exact.device.type):
            displacements = rotations.displacements(exact.dtype)
            if guarded:
                displacements = finite_or_zero(displacements, self._not_finite)
            return self._rotated(exact, rotations, *displacements)

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

    @staticmethod
    def _frame(rotations: Rotations, weight: Tensor) -> Tensor:
        """Return ``weight (out, in)``, given in the natural order, in the frame that the layer stores."""
        raise NotImplementedError

    @staticmethod
    def _options(settings: PoetSettings) -> dict[str, Any]:
        """Return the arguments of the subclass's constructor that this class does not have."""
        return {}

    def _rotations_to_fold(self) -> Rotations:
        """Return the rotations that a fold has to apply."""
        return self.rotations

    def _rotated(self, stored: Tensor, rotations: Rotations, d_out: Tensor | None, d_in: Tensor | None) -> Tensor:
        """Return the weight in the natural order, rotated by displacements, from the dequantized stored weight."""
        raise NotImplementedError
