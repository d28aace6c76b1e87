"""``orthotrain::oft_linear``: a torch custom op where torch.compile traces, a plain autograd function in eager mode."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from orthotrain.kernels.checks import check_blocks, traced
from orthotrain.kernels.dispatch import implementation
from orthotrain.kernels.guard import guarded, returned


def _product(x: Tensor, weight: Tensor, displacement: Tensor, bias: Tensor | None) -> Tensor:
    with guarded(x):
        return implementation(x, "oft_linear").oft_linear_forward(x, weight, displacement, bias)


def _gradients(
    grad: Tensor, x: Tensor, weight: Tensor, displacement: Tensor, need_x: bool, need_displacement: bool
) -> tuple[Tensor | None, Tensor | None]:
    with guarded(x):
        backward = implementation(x, "oft_linear").oft_linear_backward
        return backward(grad, x, weight, displacement, need_x, need_displacement)


@torch.library.custom_op("orthotrain::oft_linear", mutates_args=())
def _oft_linear(x: Tensor, weight: Tensor, displacement: Tensor, bias: Tensor | None) -> Tensor:
    return _product(x, weight, displacement, bias)


@_oft_linear.register_fake
def _(x: Tensor, weight: Tensor, displacement: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.custom_op("orthotrain::oft_linear_backward", mutates_args=())
def _oft_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, displacement: Tensor, need_x: bool, need_displacement: bool
) -> tuple[Tensor, Tensor]:
    grad_x, grad_displacement = _gradients(grad, x, weight, displacement, need_x, need_displacement)
    return returned(grad_x, x), returned(grad_displacement, displacement)


@_oft_linear_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, displacement: Tensor, need_x: bool, need_displacement: bool
) -> tuple[Tensor, Tensor]:
    grad_x = x.new_empty(x.shape if need_x else 0)
    return grad_x, displacement.new_empty(displacement.shape if need_displacement else 0)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, displacement, bias = inputs
    ctx.save_for_backward(x, weight, displacement)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _bias_gradient(ctx: Any, grad: Tensor) -> Tensor | None:
    if not ctx.needs_input_grad[3]:
        return None
    return grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)


def _traced_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None]:
    need_x, _, need_displacement, _ = ctx.needs_input_grad
    grad_x, grad_displacement = _oft_linear_backward(grad, *ctx.saved_tensors, need_x, need_displacement)
    return (
        grad_x if need_x else None,
        None,
        grad_displacement if need_displacement else None,
        _bias_gradient(ctx, grad),
    )


_oft_linear.register_autograd(_traced_backward, setup_context=_setup_context)


class OftLinearFunction(torch.autograd.Function):
    """The same in eager mode, where a custom op with a gradient costs more than a small layer's rotation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, displacement: Tensor, bias: Tensor | None) -> Tensor:
        """See :func:`oft_linear`."""
        _setup_context(ctx, (x, weight, displacement, bias), x)
        return _product(x, weight, displacement, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None]:
        """Form the gradients that are needed."""
        need_x, _, need_displacement, _ = ctx.needs_input_grad
        x, weight, displacement = ctx.saved_tensors
        grad_x, grad_displacement = _gradients(grad, x, weight, displacement, need_x, need_displacement)
        return grad_x, None, grad_displacement, _bias_gradient(ctx, grad)


def oft_linear(x: Tensor, weight: Tensor, displacement: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``(x R) W^T + bias`` with ``R = I + Diag(D_1 .. D_n)``, differentiable in ``x``, ``D`` and the bias.

    Saved for backward are the arguments alone: layers that read one ``x`` share it. Autocast does not reach inside.

    Args:
        x: Activations ``(..., in)``.
        weight: Frozen weight ``(out, in)`` on the device of ``x``; of another dtype it is cast for the product.
        displacement: ``D = R - I`` of ``n`` blocks, ``(n, b, b)``, ``n * b <= in``, dtype and device of ``x``.
        bias: ``(out,)``, cast likewise, or None.

    Returns:
        ``(..., out)`` in the dtype of ``x``.

    Raises:
        ValueError: If the displacement has another dtype, the blocks are not square or they do not fit, or the width of
            ``x`` is not that of the weight, or ``triton`` was asked for and cannot serve ``x``.
    """
    check_blocks("oft_linear", "displacement", displacement, x, "x", x.shape[-1])
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"oft_linear: x has {x.shape[-1]} features and the weight takes {weight.shape[1]}")
    if traced(x):
        return _oft_linear(x, weight, displacement, bias)
    return OftLinearFunction.apply(x, weight, displacement, bias)
