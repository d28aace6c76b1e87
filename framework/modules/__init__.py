"""LightningModules that carry the methods."""

from orthotrain.modules.base import BaseModule
from orthotrain.modules.lora import LoraLayers, LoraModule
from orthotrain.modules.oft import OftLayers, OftModule
from orthotrain.modules.optimization import ClipRamp, Optimization
from orthotrain.modules.poet import PoetModule
from orthotrain.modules.poet_layers import PoetLayers

__all__ = [
    "BaseModule",
    "ClipRamp",
    "LoraLayers",
    "LoraModule",
    "OftLayers",
    "OftModule",
    "Optimization",
    "PoetLayers",
    "PoetModule",
]
