"""One trained factor beside the rotations of a layer: how large its weight is, which they cannot change."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, log: Tensor) -> Tensor:
        scaled = (y * log.exp()).to(y.dtype)
        # the result and not y: a rotation behind it keeps the same tensor
        ctx.save_for_backward(scaled, log)
        return scaled

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        scaled, log = ctx.saved_tensors
        (grad,) = grads
        wide = torch.promote_types(grad.dtype, torch.float32)
        return (grad * log.exp()).to(grad.dtype), (grad * scaled).sum(dtype=wide).to(log.dtype).view(1)


class TrainedScale(nn.Module):
    """``e^log``: positive, 1 at the start, multiplies all singular values of a weight and leaves their ratios alone.

    Its one parameter ``log (1,)`` is fp32 and stays so when a network is cast to 16 bits, as generators do. With
    ``y = e^log u`` its gradient is ``<dL/dy, y>``, which asks for no other tensor than the result.
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
