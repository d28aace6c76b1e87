"""LightningModules that carry the methods."""

from orthotrain.modules.base import BaseModule
from orthotrain.modules.optimization import Optimization
from orthotrain.modules.poet import PoetLayers, PoetModule

__all__ = ["BaseModule", "Optimization", "PoetLayers", "PoetModule"]
