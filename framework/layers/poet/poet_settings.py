"""The settings of one POET layer: the blocks of its two sides, its rotations and the storage of its weight."""

from dataclasses import dataclass
from typing import Literal, get_origin, get_type_hints

from orthotrain.errors import ConfigurationError, check_choice
from orthotrain.kernels.permutations import GROUPS
from orthotrain.layers.checks import check_block_size, check_parameterization
from orthotrain.layers.poet.route_costs import ActivationMode, RouteChoice
from orthotrain.layers.weights.storage import Storage, check_group_size
from orthotrain.plugins import CayleyNeumann, Parameterization

Side = Literal["in", "out"]
Sides = Literal["both", "in", "out"]
Aligned = Literal["none", "in", "out", "both"]

TOO_COARSE = (
    "rounding it at each of thousands of folds moves its singular values; take storage: residual, or dense and fp32"
)
"""Why a weight that is folded at every step is not stored in 16 bits."""

GROUPS_IN_BLOCK = 8
"""A block holds at least this many default permutation groups: with fewer groups, features would mix badly."""

ANCHOR_EVERY = {"int8": 16, "nf4": 4}
"""Default ``anchor_every`` by storage: rare enough that the singular value decompositions take no noticeable time."""


@dataclass(frozen=True)
class PoetSettings:
    """Settings of one POET layer.

    Args:
        block_size: Block-stochastic POET (arXiv:2506.08001, section 3.2): blocks of this size on the whole width.
        fraction: Fully stochastic POET, in place of ``block_size``: one block on ``round(fraction * width)`` features,
            which each merge draws anew; in (0, 1]. None for block-stochastic POET.
        block_size_out: Block size of the output side, None for ``block_size``.
        fraction_out: Fraction of the output side, None for ``fraction``.
        sides: Which sides are rotated: ``both``, or only ``in`` or ``out``.
        aligned: Sides whose blocks are neighboring features and never permuted: ``none``, ``in``, ``out`` or ``both``.
            With the width of an attention head as block size, and ``overrides`` for the projections, each head is
            rotated within itself.
        permutation_group: Neighboring features that permutations move together: 1, 2, 4 or 8. Must divide the widths
            and the block sizes. Larger groups are permuted faster. None for the largest group of which a block holds 8
            or more.
        parameterization: How generators become rotations: a registered name (`orthotrain plugins` lists them) or a
            class with its arguments, in YAML ``{class_path: CayleyNeumann, init_args: {order: 4}}``. None for
            ``CayleyNeumann`` of order 4, or of order 2 with ``stepwise``: the angle of one step is small, and order 2
            is orthogonal to ``||Q||^6``, 2e-10 at a norm of 0.024.
        storage: Format of the frozen weight. ``dense``: the dtype of the network; merges round stochastically to bf16,
            to nearest in fp16. ``bf16``: 2 bytes a value, merges round stochastically. ``residual``: bf16 and one byte
            more for the rounding error, 100 times more exact over many merges. ``int8``: POET-XQ (arXiv:2603.05500,
            section 3.4). ``nf4``: 4-bit NormalFloat.
        group_size: Values that share a scale in ``int8`` (None: 256) and ``nf4`` (None: 64).
        anchor_every: Merges between two restorations of the initial singular values, 0 for never. A restoration is a
            singular value decomposition of the weight. None for 16 with ``int8`` and 4 with ``nf4``, whose rounding
            errors would add up (singular values then stay within 5e-3 and 6e-2 of the largest, in the worst of 1,000
            merges), and for never with the other formats.
        stepwise: Whether rotations are folded at every step (:class:`StepwiseLinear`), so that the forward pass is a
            plain product. ``PoetModule(stepwise=True)`` sets it for all layers; set it here, in ``overrides``, for
            some of them, where None is false. Needs ``merge_every: 1`` and a weight in fp32 or with a ``residual``.
        trained_scale: Whether the layer has a trained factor of its weight, 1 at the start (:class:`TrainedScale`).
            Published POET has none: with a factor singular values keep their ratios, but not their size. The factor is
            trained like the parameters that are not generators, without weight decay.
        route: ``input`` rotates activations, ``weight`` rotates the weight, ``auto`` takes the cheaper of both for each
            layer and number of tokens.
        activation_mode: ``fast`` keeps one activation more in each layer, ``mem`` recomputes it in backward.

    Raises:
        ConfigurationError: For a value out of its range, naming the setting and values that would work.
    """

    block_size: int = 256
    fraction: float | None = None
    block_size_out: int | None = None
    fraction_out: float | None = None
    sides: Sides = "both"
    aligned: Aligned = "none"
    permutation_group: int | None = None
    parameterization: Parameterization | str | None = None
    storage: Storage = "dense"
    group_size: int | None = None
    anchor_every: int | None = None
    stepwise: bool | None = None
    trained_scale: bool = False
    route: RouteChoice = "auto"
    activation_mode: ActivationMode = "fast"

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(PoetSettings).items():
            if get_origin(hint) is Literal:
                check_choice(name, getattr(self, name), hint)
        for name in ("fraction", "fraction_out"):
            fraction = getattr(self, name)
            if fraction is not None and not 0 < fraction <= 1:
                raise ConfigurationError(f"{name}={fraction!r}: take a part of the width above 0 and up to 1")
        if self.aligned != "none" and (self.fraction is not None or self.fraction_out is not None):
            raise ConfigurationError(
                f"aligned={self.aligned!r} with a fraction: each merge would rotate the same features; "
                "take block_size, or aligned: none"
            )
        group = self.permutation_group
        if group is not None and (isinstance(group, bool) or group not in GROUPS):
            raise ConfigurationError(f"permutation_group={group!r}: take 1, 2, 4 or 8 features, or null")
        check_group_size(self.group_size, self.storage)
        if self.anchor_every is not None and (isinstance(self.anchor_every, bool) or self.anchor_every < 0):
            raise ConfigurationError(f"anchor_every={self.anchor_every!r}: take a number of merges, or 0 for never")
        if self.stepwise and self.storage == "bf16":
            raise ConfigurationError(f"stepwise with storage='bf16': {TOO_COARSE}")
        if self.stepwise and (self.anchor_every or self.storage in ("int8", "nf4")):
            raise ConfigurationError(
                f"stepwise with storage={self.storage!r}, anchor_every={self.anchor_every}: the change of one step "
                "is smaller than the rounding steps of int8 and NF4; take dense or residual, and no anchor"
            )
        check_parameterization(self.used_parameterization)

    @property
    def used_parameterization(self) -> Parameterization | str:
        """The parameterization, or its default where none is given."""
        if self.parameterization is not None:
            return self.parameterization
        return CayleyNeumann(order=2) if self.stepwise else CayleyNeumann()

    def blocks(self, side: Side, width: int) -> tuple[int, int] | None:
        """Return block size and number of blocks of a side of ``width`` features, None for a side that is not rotated.

        Raises:
            ConfigurationError: If no such block fits, naming sizes that would.
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
            if width < 2:
                check_block_size(width, size)
            if size < 2:
                raise ConfigurationError(
                    f"fraction={fraction} of {width} features is {size}: a rotation needs 2 or more, "
                    f"take at least {2 / width:.4g}"
                )
            return size, 1
        check_block_size(width, size)
        return size, width // size

    def permuted_together(self, width: int, block_size: int) -> int:
        """Return how many neighboring features permutations of ``width`` features in blocks of a size move together.

        Raises:
            ConfigurationError: If the given group does not divide width and block size, or a block holds only one.
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

    @property
    def anchor_period(self) -> int:
        """Merges between two restorations of the initial singular values, 0 for never."""
        if self.anchor_every is not None:
            return self.anchor_every
        return ANCHOR_EVERY.get(self.storage, 0)
