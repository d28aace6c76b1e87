"""The matrix exponential of skew-symmetric blocks."""

from orthotrain.kernels.exponential.cpu import DEGREE, squarings
from orthotrain.kernels.exponential.op import exponential

__all__ = ["DEGREE", "exponential", "squarings"]
