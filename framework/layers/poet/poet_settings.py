"""How one POET layer is set up: block shapes of its sides, rotations, and the storage of its frozen weight."""

from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from torch import Tensor

from orthotrain.errors import ConfigurationError, check_choice
from orthotrain.kernels.permutations import GROUPS
from orthotrain.layers.checks import check_block_size, check_parameterization
from orthotrain.layers.poet.route_costs import ActivationMode, Centre
from orthotrain.layers.poet.trained_scale import TrainedScale
from orthotrain.layers.weights.bf16_weight import Bf16Weight
from orthotrain.layers.weights.frozen_weight import DenseWeight, FrozenWeight
from orthotrain.layers.weights.quantized_weight import Int8Weight, Nf4Weight
from orthotrain.plugins import Parameterization

Side = Literal["in", "out"]
Sides = Literal["both", "in", "out"]
Aligned = Literal["none", "in", "out", "both"]
Storage = Literal["dense", "bf16", "residual", "int8", "nf4"]

TOO_COARSE = (
    "rounding it at each of thousands of folds moves its singular values; take storage: residual, or dense and fp32"
)
"""Why a weight that folds every step is not stored in 16 bits."""

GROUPS_IN_BLOCK = 8
"""Groups of neighbours that a block holds at least: permutations of fewer would mix few of a layer's features."""

ANCHOR_EVERY = {"int8": 16, "nf4": 4}
"""Merges between restorations of the spectrum where none is asked for: so few that their decompositions do not show."""

# a fraction takes the place of a block size
FRACTION_OF = {"block_size": "fraction", "block_size_out": "fraction_out"}


@dataclass(frozen=True)
class PoetSettings:
    """Settings of one POET layer.

    Args:
        block_size: Block-stochastic POET (arXiv:2506.08001, section 3.2): blocks of this size on the whole width.
        fraction: Fully stochastic POET, in place of ``block_size``: one block on ``round(fraction * width)`` features
            drawn anew at each merge, in (0, 1]. None for block-stochastic POET.
        block_size_out: Block size of the output side where it differs from that of the input.
        fraction_out: Fraction of the output side where it differs.
        sides: Which sides are rotated: ``both``, or only ``in`` or ``out``.
        aligned: Sides whose blocks are neighbouring features and never permuted: ``none``, ``in``, ``out`` or ``both``.
            With the width of an attention head as block size and ``overrides`` for the projections, the heads rotate
            within themselves.
        permutation_group: Neighbouring features that permutations move together: 1, 2, 4 or 8, dividing the widths and
            the block sizes. Larger groups are permuted faster; None for the largest of which a block holds 8 or more.
        parameterization: How generators become rotations: a registered name (`orthotrain plugins` lists them) or a
            class with its arguments, in YAML ``{class_path: CayleyNeumann, init_args: {order: 4}}``.
        storage: How the frozen weight is kept. ``dense``: in the dtype of the network; merges round stochastically to
            bf16, to the nearest in fp16. ``bf16``: 2 bytes a value, merges round stochastically. ``residual``: bf16 and
            one byte more that carries what rounding loses, 100 times more exact over many merges. ``int8`` (POET-XQ,
            arXiv:2603.05500, section 3.4) and ``nf4``.
        group_size: Values that share a scale in ``int8`` (None: 256) and ``nf4`` (None: 64).
        anchor_every: Merges between restorations of the singular values of the start, 0 for never. None for 16 with
            ``int8`` and 4 with ``nf4``, whose rounding would pile up (singular values then stay within 4e-3 and 4e-2 of
            the largest), and for never with others. A restoration is a singular value decomposition of the weight.
        stepwise: Whether rotations are folded every step (:class:`StepwiseLinear`): the forward pass is a plain
            product. Needs ``merge_every: 1``, and a weight in fp32 or with a ``residual``: rounding to 16 bits adds up.
        trained_scale: Whether a layer has a trained factor of its weight, 1 at the start (:class:`TrainedScale`). No
            part of POET as published: singular values keep their ratios and not their size. It is trained with
            everything that is not a generator, without weight decay.
        centre: ``input``, ``weight``, or ``auto`` for the cheaper one in each layer.
        activation_mode: ``fast`` keeps one activation more in each layer, ``mem`` recomputes it in backward.

    Raises:
        ConfigurationError: For a value that cannot be, naming it and what would work.
    """

    block_size: int = 256
    fraction: float | None = None
    block_size_out: int | None = None
    fraction_out: float | None = None
    sides: Sides = "both"
    aligned: Aligned = "none"
    permutation_group: int | None = None
    parameterization: Parameterization | str = "cayley_neumann"
    storage: Storage = "dense"
    group_size: int | None = None
    anchor_every: int | None = None
    stepwise: bool = False
    trained_scale: bool = False
    centre: Centre = "auto"
    activation_mode: ActivationMode = "fast"

    def __post_init__(self) -> None:
        for name, choices in (
            ("sides", Sides),
            ("aligned", Aligned),
            ("storage", Storage),
            ("centre", Centre),
            ("activation_mode", ActivationMode),
        ):
            check_choice(name, getattr(self, name), choices)
        for fraction in FRACTION_OF.values():
            check_fraction(fraction, getattr(self, fraction))
        if self.aligned != "none" and (self.fraction is not None or self.fraction_out is not None):
            raise ConfigurationError(
                f"aligned={self.aligned!r} with a fraction: the same features would be rotated for ever; "
                "take block_size, or aligned: none"
            )
        group = self.permutation_group
        if group is not None and (isinstance(group, bool) or group not in GROUPS):
            raise ConfigurationError(f"permutation_group={group!r}: take 1, 2, 4 or 8 features, or null")
        if self.group_size is not None and self.storage not in ("int8", "nf4"):
            raise ConfigurationError(f"group_size={self.group_size}: storage={self.storage!r} has no groups")
        if self.anchor_every is not None and (isinstance(self.anchor_every, bool) or self.anchor_every < 0):
            raise ConfigurationError(f"anchor_every={self.anchor_every!r}: take a number of merges, or 0 for never")
        if self.stepwise and self.storage == "bf16":
            raise ConfigurationError(f"stepwise with storage='bf16': {TOO_COARSE}")
        if self.stepwise and (self.anchor_every or self.storage in ("int8", "nf4")):
            raise ConfigurationError(
                f"stepwise with storage={self.storage!r}, anchor_every={self.anchor_every}: one step is below the "
                "steps of int8 and NF4; take dense or residual, and no anchor"
            )
        check_parameterization(self.parameterization)

    def blocks(self, side: Side, width: int) -> tuple[int, int] | None:
        """Return block size and number of blocks on a side of ``width`` coordinates, None if it is not rotated.

        Raises:
            ConfigurationError: If no such block fits, naming what would.
        """
        if self.sides not in ("both", side):
            return None
        size, fraction = self.block_size, self.fraction
        if side == "out" and self.block_size_out is not None:
            size, fraction = self.block_size_out, None
        if side == "out" and self.fraction_out is not None:
            fraction = self.fraction_out
        if fraction is not None:
            size = round(fraction * width)
            if size < 2:
                raise ConfigurationError(
                    f"fraction={fraction} of {width} coordinates is {size}: a rotation needs 2 or more, "
                    f"take at least {2 / width:.4g}"
                )
            return size, 1
        check_block_size(width, size)
        return size, width // size

    def permuted_together(self, width: int, block_size: int) -> int:
        """Return how many neighbours move together in permutations of ``width`` features in blocks of a size.

        Raises:
            ConfigurationError: If the group that is asked for does not divide them, or a block holds only one.
        """
        group = self.permutation_group
        if group is None:
            fitting = (group for group in GROUPS if width % group == 0 and block_size % (GROUPS_IN_BLOCK * group) == 0)
            return next(fitting, 1)
        if width % group or block_size % group or block_size == group:
            raise ConfigurationError(
                f"permutation_group={group} does not fit {width} features in blocks of {block_size}: it must divide "
                "both, and a block must hold two groups or more to be mixed with others; take null or 1"
            )
        return group

    def freeze(self, weight: Tensor) -> FrozenWeight:
        """Store ``weight (out, in)`` as :attr:`storage` says; ``dense`` holds the tensor itself.

        Raises:
            ConfigurationError: If the group size or the dtype does not fit.
        """
        match self.storage:
            case "dense":
                return DenseWeight(weight)
            case "bf16":
                return Bf16Weight(weight)
            case "residual":
                return Bf16Weight(weight, residual=True)
            case "int8":
                return Int8Weight(weight, group_size=self.group_size)
            case "nf4":
                return Nf4Weight(weight, group_size=self.group_size)

    def scale(self) -> TrainedScale | None:
        """Return the trained factor of a layer, None if it has none."""
        return TrainedScale() if self.trained_scale else None

    @property
    def anchor_period(self) -> int:
        """Merges between two restorations of the spectrum, 0 for never."""
        if self.anchor_every is not None:
            return self.anchor_every
        return ANCHOR_EVERY.get(self.storage, 0)

    def override(self, values: dict[str, Any]) -> Self:
        """Return these settings with some replaced; a block size given alone takes the place of a fraction.

        Raises:
            ConfigurationError: For a name that is no setting.
        """
        known = {name: getattr(self, name) for name in self.__dataclass_fields__}
        unknown = set(values) - set(known)
        if unknown:
            raise ConfigurationError(f"overrides: {sorted(unknown)[0]!r} is no setting; there are {', '.join(known)}")
        for size, fraction in FRACTION_OF.items():
            if size in values:
                values = {fraction: None, **values}
        return replace(self, **values)


def check_fraction(name: str, fraction: float | None) -> None:
    """Refuse a fraction outside (0, 1].

    Raises:
        ConfigurationError: Naming it.
    """
    if fraction is not None and not 0 < fraction <= 1:
        raise ConfigurationError(f"{name}={fraction!r}: take a part of the width above 0 and up to 1")
