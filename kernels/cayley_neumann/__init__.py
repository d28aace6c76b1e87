"""The Cayley transform with its inverse replaced by a truncated Neumann series."""

from orthotrain.kernels.cayley_neumann.op import cayley_neumann

__all__ = ["cayley_neumann"]
