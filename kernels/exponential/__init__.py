"""The matrix exponential of skew-symmetric blocks."""

from orthotrain.kernels.exponential.op import exponential
from orthotrain.kernels.exponential.reference import DEGREE, squarings

__all__ = ["DEGREE", "exponential", "squarings"]
