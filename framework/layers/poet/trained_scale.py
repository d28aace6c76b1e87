"""A trained factor of a weight: rotations cannot change the size of the singular values."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from orthotrain.kernels.tangent.scale import log_gradient, scaled


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, log: Tensor, last: bool) -> Tensor:
        result = scaled(y, log, y.dtype)
        # a rotation after this saves the result too; the output of a layer may be changed in place
        ctx.save_for_backward(y if last else result, log)
        ctx.last = last
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        kept, log = ctx.saved_tensors
        (grad,) = grads
        result = scaled(kept, log, kept.dtype) if ctx.last else kept
        return scaled(grad, log, grad.dtype), log_gradient(grad, result, log), None


class TrainedScale(nn.Module):
    """``e^log``: a positive factor, 1 at the start, of all singular values of a weight; their ratios stay the same.

    The parameter ``log (1,)`` stays in fp32 when a network is cast to 16 bits, as generators do. With ``y = e^log u``
    its gradient is ``<dL/dy, y>``, so that only the result or the input is saved for backward.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.zeros(1, dtype=torch.float32))

    def forward(self, y: Tensor, last: bool = False) -> Tensor:
        """Return ``e^log y`` in the dtype of ``y``, multiplied in fp32 or wider.

        Args:
            y: Any tensor.
            last: Whether the result may be changed in place. Then ``y`` is kept for backward, and not the result.
        """
        return _Scaled.apply(y, self.log, last)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.log.detach()
        super()._apply(fn, recurse)
        if self.log.dtype in (torch.bfloat16, torch.float16):
            self.log.data = before.to(self.log.device, torch.float32)
        return self
