"""The matrix exponential of skew-symmetric blocks."""

from orthotrain.kernels.exponential.op import exponential

__all__ = ["exponential"]
