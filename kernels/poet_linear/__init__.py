"""The product of the POET layer with its folded weight, whose rotations get their gradients from activations."""

from orthotrain.kernels.poet_linear.op import poet_linear, serves

__all__ = ["poet_linear", "serves"]
