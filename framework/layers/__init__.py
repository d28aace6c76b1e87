"""Layers: block rotations, frozen weights, and the POET layer made of them."""

from orthotrain.layers.bf16_weight import Bf16Weight
from orthotrain.layers.block_rotation import BlockRotation
from orthotrain.layers.frozen_linear import FrozenLinear
from orthotrain.layers.frozen_weight import DenseWeight, FrozenWeight
from orthotrain.layers.initialization import initialize_
from orthotrain.layers.lora_linear import LoraLinear
from orthotrain.layers.mergeable import Mergeable, mergeable_layers
from orthotrain.layers.oft_conv2d import OftConv2d
from orthotrain.layers.oft_embedding import OftEmbedding
from orthotrain.layers.oft_linear import OftLinear
from orthotrain.layers.oft_rotation import OftRotation
from orthotrain.layers.poet_linear import PoetLinear
from orthotrain.layers.poet_settings import PoetSettings
from orthotrain.layers.quantized_weight import Int8Weight, Nf4Weight, QuantizedWeight
from orthotrain.layers.stepwise_linear import StepwiseLinear
from orthotrain.layers.surgery import replace_linears, select_linears, unwrap_mergeables
from orthotrain.layers.trained_scale import TrainedScale

__all__ = [
    "Bf16Weight",
    "BlockRotation",
    "DenseWeight",
    "FrozenLinear",
    "FrozenWeight",
    "Int8Weight",
    "LoraLinear",
    "Mergeable",
    "Nf4Weight",
    "OftConv2d",
    "OftEmbedding",
    "OftLinear",
    "OftRotation",
    "PoetLinear",
    "PoetSettings",
    "QuantizedWeight",
    "StepwiseLinear",
    "TrainedScale",
    "initialize_",
    "mergeable_layers",
    "replace_linears",
    "select_linears",
    "unwrap_mergeables",
]
