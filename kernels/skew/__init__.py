"""Skew-symmetric blocks from their generators."""

from orthotrain.kernels.skew.cpu import block_size_of
from orthotrain.kernels.skew.op import skew

__all__ = ["block_size_of", "skew"]
