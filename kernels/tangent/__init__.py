"""A block rotation that is known to be the identity: only its gradient is left."""

from orthotrain.kernels.tangent.op import tangent, tangent_linear, tangent_output

__all__ = ["tangent", "tangent_linear", "tangent_output"]
