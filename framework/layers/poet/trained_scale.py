"""A trained factor of a weight: rotations cannot change the size of the singular values."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from orthotrain.kernels.tangent.scale import log_gradient, scaled


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, log: Tensor) -> Tensor:
        result = scaled(y, log, y.dtype)
        # saves the result and not y: a rotation after this saves the same tensor
        ctx.save_for_backward(result, log)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        result, log = ctx.saved_tensors
        (grad,) = grads
        return scaled(grad, log, grad.dtype), log_gradient(grad, result, log)


class TrainedScale(nn.Module):
    """``e^log``: a positive factor, 1 at the start, of all singular values of a weight; their ratios stay the same.

    The parameter ``log (1,)`` stays in fp32 when a network is cast to 16 bits, as generators do. With ``y = e^log u``
    its gradient is ``<dL/dy, y>``, so that only the result is saved for backward.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.zeros(1, dtype=torch.float32))

    def forward(self, y: Tensor) -> Tensor:
        """Return ``e^log y`` in the dtype of ``y``, multiplied in fp32 or wider."""
        return _Scaled.apply(y, self.log)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.log.detach()
        super()._apply(fn, recurse)
        if self.log.dtype in (torch.bfloat16, torch.float16):
            self.log.data = before.to(self.log.device, torch.float32)
        return self
