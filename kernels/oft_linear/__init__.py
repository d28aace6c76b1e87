"""The product of the OFT layer with its frozen weight: rotation and product as one operation."""

from orthotrain.kernels.oft_linear.front import OftLinearInFront, has_gradient_in_front, in_front
from orthotrain.kernels.oft_linear.op import oft_linear
from orthotrain.kernels.oft_linear.reference import rotates_weight

__all__ = ["OftLinearInFront", "has_gradient_in_front", "in_front", "oft_linear", "rotates_weight"]
