"""Layers: block rotations, frozen weights, and the POET, OFT and LoRA layers that are made of them."""

from orthotrain.layers.lora_linear import LoraLinear
from orthotrain.layers.oft.oft_conv2d import OftConv2d
from orthotrain.layers.oft.oft_embedding import OftEmbedding
from orthotrain.layers.oft.oft_layer import OftLayer
from orthotrain.layers.oft.oft_linear import OftLinear
from orthotrain.layers.oft.oft_rotation import OftRotation
from orthotrain.layers.oft.oft_settings import OftSettings
from orthotrain.layers.poet.initialization import initialize_
from orthotrain.layers.poet.poet_linear import PoetLinear
from orthotrain.layers.poet.poet_settings import PoetSettings
from orthotrain.layers.poet.stepwise_linear import StepwiseLinear
from orthotrain.layers.poet.trained_scale import TrainedScale
from orthotrain.layers.protocols import Mergeable, mergeable_layers
from orthotrain.layers.replacement import replace_linears, unwrap_mergeables
from orthotrain.layers.rotation.block_rotation import BlockRotation
from orthotrain.layers.selection import select_linears
from orthotrain.layers.weights.bf16_weight import Bf16Weight
from orthotrain.layers.weights.frozen_linear import FrozenLinear
from orthotrain.layers.weights.frozen_weight import DenseWeight, FrozenWeight
from orthotrain.layers.weights.quantized_weight import Int8Weight, Nf4Weight, QuantizedWeight

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
    "OftLayer",
    "OftLinear",
    "OftRotation",
    "OftSettings",
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
