"""A factor ``e^log`` of a matrix, applied in fp32 or wider, and the gradient for ``log``."""

import torch
from torch import Tensor


def scaled(x: Tensor, log: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return ``e^log x`` in ``dtype``, for ``log (1,)`` in fp32 or wider, or None for a factor of 1.

    There is no cast to the dtype that the product already has: torch.compile of torch 2.11 gives zero gradients,
    without an error, to an autograd function whose forward ends in a cast that returns its input.
    """
    y = x if log is None else x * log.exp()
    return y if y.dtype == dtype else y.to(dtype)


def log_gradient(grad: Tensor, result: Tensor, log: Tensor) -> Tensor:
    """Return ``dL/dlog = <dL/dy, y>``, ``(1,)``, for the ``result`` y of :func:`scaled` and its gradient."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    return (grad * result).sum(dtype=wide).to(log.dtype).view(1)
