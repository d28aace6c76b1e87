"""The settings of one OFT layer: its blocks, its rotation and the storage of its weight."""

from dataclasses import dataclass
from typing import Literal

from orthotrain.errors import ConfigurationError, check_choice
from orthotrain.layers.checks import check_parameterization
from orthotrain.layers.weights.storage import Storage, check_group_size
from orthotrain.plugins import Parameterization

RotationDtype = Literal["input", "float32"]
OFT_STORAGES = (None, "dense", "int8", "nf4")


@dataclass(frozen=True)
class OftSettings:
    """Settings of one OFT layer.

    Args:
        block_size: Size of the rotated blocks; must divide the rotated width (of a convolution with groups: the input
            channels of one group).
        parameterization: How generators become rotations: a registered name (`orthotrain plugins` lists them) or a
            class with its arguments, in YAML ``{class_path: CayleyNeumann, init_args: {order: 4}}``.
        storage: Format of the frozen weight of a linear layer: ``dense`` (the dtype of the network), ``int8`` or
            ``nf4``. None for the format that the layer has: dense, or quantized by bitsandbytes.
        group_size: Values that share a scale in ``int8`` (None for 256, or where 256 does not divide a width, the
            largest power of two that does, at least 32) and ``nf4`` (None for 64).
        block_share: Whether all blocks of a layer share the generators of one block.
        coft_eps: COFT (arXiv:2306.07280): bound of the Frobenius norm ``||Q||`` over all blocks of a layer together,
            kept by projection after each step; to first order ``||R - I|| <= 2 coft_eps``. None for no bound.
        block_dropout: Probability with which a block is the identity for one forward pass in training. The other blocks
            are not rescaled, since a product of rotations has no mean to keep.
        rotation_dtype: ``input`` rotates in the dtype of the activations: ``D = R - I`` is computed in fp32 and rounded
            to that dtype, and the sum ``x + x D`` is accumulated in fp32. ``float32`` rotates 16-bit activations in
            fp32 and rounds the result.

    Raises:
        ConfigurationError: For a value out of its range, naming the setting and values that would work.
    """

    block_size: int = 32
    parameterization: Parameterization | str = "cayley_neumann"
    storage: Storage | None = None
    group_size: int | None = None
    block_share: bool = False
    coft_eps: float | None = None
    block_dropout: float = 0.0
    rotation_dtype: RotationDtype = "input"

    def __post_init__(self) -> None:
        check_parameterization(self.parameterization)
        if self.coft_eps is not None and not self.coft_eps > 0:
            raise ConfigurationError(f"coft_eps={self.coft_eps!r}: take a positive bound, or null for none")
        if not 0 <= self.block_dropout < 1:
            raise ConfigurationError(
                f"block_dropout={self.block_dropout!r}: take a probability of at least 0 and below 1"
            )
        check_choice("rotation_dtype", self.rotation_dtype, RotationDtype)
        if self.storage not in OFT_STORAGES:
            raise ConfigurationError(
                f"storage={self.storage!r}: the weight of an OFT layer does not change in training, and needs no "
                "storage for many merges; take dense, int8 or nf4, or null for the format that the layer has"
            )
        check_group_size(self.group_size, self.storage)
