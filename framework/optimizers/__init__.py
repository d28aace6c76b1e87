"""Optimizers beside those of torch and bitsandbytes."""

from orthotrain.optimizers.composite import CompositeOptimizer
from orthotrain.optimizers.galore import GaLore
from orthotrain.optimizers.lie import LieOptimizer

__all__ = ["CompositeOptimizer", "GaLore", "LieOptimizer"]
