"""The product of the OFT layer with its frozen weight: rotation and product as one operation."""

from orthotrain.kernels.oft_linear.op import oft_linear

__all__ = ["oft_linear"]
