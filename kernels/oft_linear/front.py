"""The product behind rotated rows of W whose gradient for D is undone for all layers of a network at once.

The route through ``V = W R^T`` finds ``S = x^T dL/dx`` (README.md): the gradient of a perturbation in front of the
rotation, ``R -> (I + P) R``, for ``P``. What makes ``dL/dD = S R^-T`` of it is four products of small matrices, which
cost a layer more in calls than in arithmetic: ``in_front`` does them for a whole batch of layers.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from orthotrain.kernels.block_batches import (
    gram_deviation,
    in_parts,
    inverts_by_transposing,
    largest,
    times_inverse_transpose,
)
from orthotrain.kernels.block_rotate.reference import block_products
from orthotrain.kernels.guard import guarded
from orthotrain.kernels.oft_linear.reference import fold_weight


class _InFront(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, displacement: Tensor) -> Tensor:
        ctx.save_for_backward(displacement)
        return displacement.view_as(displacement)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, contraction: Tensor) -> Tensor:
        (displacement,) = ctx.saved_tensors

        def part(displacement: Tensor, contraction: Tensor) -> Tensor:
            return times_inverse_transpose(contraction, displacement, gram_deviation(displacement))

        return in_parts(part, displacement, contraction, block_size=displacement.shape[-1])


def in_front(displacement: Tensor) -> Tensor:
    """Return ``D`` itself, ``(n, b, b)``, whose gradient is given as ``S`` and leaves as ``dL/dD = S R^-T``.

    To be asked for only where :func:`has_gradient_in_front`.
    """
    return _InFront.apply(displacement)


@torch.no_grad()
def has_gradient_in_front(displacement: Tensor) -> bool:
    """Tell whether all rotations of ``D (n, b, b)`` are close enough to orthogonal for ``R^-T = R (I - E)``."""
    deviation = in_parts(gram_deviation, displacement, block_size=displacement.shape[-1])
    return inverts_by_transposing(largest(deviation), displacement.dtype)


class OftLinearInFront(torch.autograd.Function):
    """``x (W R^T)^T + bias``, which returns ``S`` as the gradient of a ``D`` that comes from :func:`in_front`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, displacement: Tensor, bias: Tensor | None) -> Tensor:
        """See :func:`oft_linear`, whose arguments these are."""
        ctx.save_for_backward(x, weight, displacement)
        ctx.bias_dtype = None if bias is None else bias.dtype
        with guarded(x):
            folded = fold_weight(weight.to(x.dtype), displacement)
            return F.linear(x, folded, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor, Tensor | None]:
        """Form all gradients: that of ``x`` is needed for ``S``."""
        x, weight, displacement = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        with guarded(x):
            grad_x = torch.mm(rows, fold_weight(weight.to(x.dtype), displacement))
            contraction = block_products(x.reshape(-1, x.shape[-1]), grad_x, *displacement.shape[:2])
        bias = rows.sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[3] else None
        return grad_x.view(x.shape), None, contraction, bias
