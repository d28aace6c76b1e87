"""Block rotation of activations: ``x + x D`` per block, between two optional permutations."""

from orthotrain.kernels.block_rotate.op import block_rotate

__all__ = ["block_rotate"]
