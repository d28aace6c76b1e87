"""The exact Cayley transform."""

from orthotrain.kernels.cayley.op import cayley

__all__ = ["cayley"]
