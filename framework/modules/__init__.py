"""LightningModules that carry the methods."""

from orthotrain.modules.base import BaseModule
from orthotrain.modules.oft import OftLayers, OftModule
from orthotrain.modules.optimization import Optimization
from orthotrain.modules.poet import PoetLayers, PoetModule

__all__ = ["BaseModule", "OftLayers", "OftModule", "Optimization", "PoetLayers", "PoetModule"]
