"""Layers: block rotations, frozen weights, and the POET layer made of them."""

from orthotrain.layers.block_rotation import BlockRotation
from orthotrain.layers.frozen_weight import DenseWeight, FrozenWeight
from orthotrain.layers.initialization import initialize_
from orthotrain.layers.mergeable import Mergeable, mergeable_layers
from orthotrain.layers.poet_linear import PoetLinear
from orthotrain.layers.surgery import replace_linears, select_linears, unwrap_mergeables

__all__ = [
    "BlockRotation",
    "DenseWeight",
    "FrozenWeight",
    "Mergeable",
    "PoetLinear",
    "initialize_",
    "mergeable_layers",
    "replace_linears",
    "select_linears",
    "unwrap_mergeables",
]
