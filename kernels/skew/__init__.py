"""Skew-symmetric blocks from their generators."""

from orthotrain.kernels.skew.op import skew

__all__ = ["skew"]
