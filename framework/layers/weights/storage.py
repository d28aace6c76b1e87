"""The formats in which a frozen weight can be stored, by the names that a config gives them."""

from typing import Literal

from torch import Tensor

from orthotrain.errors import ConfigurationError
from orthotrain.layers.weights.bf16_weight import Bf16Weight
from orthotrain.layers.weights.frozen_weight import DenseWeight, FrozenWeight
from orthotrain.layers.weights.quantized_weight import Int8Weight, Nf4Weight

Storage = Literal["dense", "bf16", "residual", "int8", "nf4"]


def store(weight: Tensor, storage: Storage, group_size: int | None = None) -> FrozenWeight:
    """Store ``weight (out, in)`` in a format; ``dense`` holds the tensor itself.

    Args:
        weight: The values, in the dtype of the network.
        storage: The format.
        group_size: Values that share a scale in ``int8`` and ``nf4``; None for the default of the format.

    Raises:
        ConfigurationError: If the group size or the dtype does not fit.
    """
    match storage:
        case "dense":
            return DenseWeight(weight)
        case "bf16":
            return Bf16Weight(weight)
        case "residual":
            return Bf16Weight(weight, residual=True)
        case "int8":
            return Int8Weight(weight, group_size=group_size)
        case "nf4":
            return Nf4Weight(weight, group_size=group_size)


def check_group_size(group_size: int | None, storage: Storage | None) -> None:
    """Refuse a group size for a storage without groups.

    Raises:
        ConfigurationError: Naming both.
    """
    if group_size is not None and storage not in ("int8", "nf4"):
        raise ConfigurationError(f"group_size={group_size} with storage={storage!r}: only int8 and nf4 have groups")
