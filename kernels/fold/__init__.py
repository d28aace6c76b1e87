"""Folding rotations into a weight: merging, and the forward pass of the weight-centric layer."""

from orthotrain.kernels.fold.op import fold

__all__ = ["fold"]
