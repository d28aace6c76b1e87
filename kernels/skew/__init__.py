"""Skew-symmetric blocks from their generators."""

from orthotrain.kernels.skew.op import skew
from orthotrain.kernels.skew.reference import block_size_of

__all__ = ["block_size_of", "skew"]
