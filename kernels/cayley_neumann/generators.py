"""The public ``cayley_neumann_generators``: skew and series in one operator, which saves only the generators."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from orthotrain.kernels.cayley_neumann.op import check_order
from orthotrain.kernels.checks import traced
from orthotrain.kernels.dispatch import implementation
from orthotrain.kernels.guard import guarded
from orthotrain.kernels.skew.op import check_generators


def _displacement(generators: Tensor, block_size: int, order: int, dtype: torch.dtype) -> Tensor:
    with guarded(generators):
        kernels = implementation(generators, "cayley_neumann")
        return kernels.cayley_neumann_generators_forward(generators, block_size, order, dtype)


def _generators_gradient(generators: Tensor, grad: Tensor, order: int) -> Tensor:
    with guarded(generators):
        kernels = implementation(generators, "cayley_neumann")
        return kernels.cayley_neumann_generators_backward(generators, grad, order)


@torch.library.custom_op("orthotrain::cayley_neumann_generators", mutates_args=())
def _cayley_neumann_generators(generators: Tensor, block_size: int, order: int, dtype: torch.dtype) -> Tensor:
    return _displacement(generators, block_size, order, dtype)


@torch.library.custom_op("orthotrain::cayley_neumann_generators_backward", mutates_args=())
def _cayley_neumann_generators_backward(generators: Tensor, grad: Tensor, order: int) -> Tensor:
    return _generators_gradient(generators, grad, order)


@_cayley_neumann_generators.register_fake
def _(generators: Tensor, block_size: int, order: int, dtype: torch.dtype) -> Tensor:
    return generators.new_empty(generators.shape[0], block_size, block_size, dtype=dtype)


@_cayley_neumann_generators_backward.register_fake
def _(generators: Tensor, grad: Tensor, order: int) -> Tensor:
    return generators.new_empty(generators.shape)


def _save(ctx, inputs: tuple[Tensor, int, int, torch.dtype], output: Tensor) -> None:
    generators, _, ctx.order, _ = inputs
    ctx.save_for_backward(generators)


def _gradient(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
    (generators,) = ctx.saved_tensors
    return _cayley_neumann_generators_backward(generators, grad, ctx.order), None, None, None


_cayley_neumann_generators.register_autograd(_gradient, setup_context=_save)


class CayleyNeumannFunction(torch.autograd.Function):
    """The same in eager mode, where a custom op with a gradient costs more than a few blocks' products."""

    @staticmethod
    def forward(ctx: Any, generators: Tensor, block_size: int, order: int, dtype: torch.dtype) -> Tensor:
        """See :func:`cayley_neumann_generators`."""
        _save(ctx, (generators, block_size, order, dtype), generators)
        return _displacement(generators, block_size, order, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """Return the gradient for the generators."""
        (generators,) = ctx.saved_tensors
        return _generators_gradient(generators, grad, ctx.order), None, None, None


def cayley_neumann_generators(
    generators: Tensor, block_size: int, order: int, dtype: torch.dtype | None = None
) -> Tensor:
    """Displacement of the Cayley-Neumann rotation from the generators: ``cayley_neumann(skew(generators, b), order)``.

    Q is a transient of both passes: only the generators, which a layer holds anyway, are saved for backward.

    Args:
        generators: Shape ``(n, block_size * (block_size - 1) // 2)``, as ``skew`` takes them; n may be 0.
        block_size: Rows and columns of one block.
        order: Highest power of the Neumann series, at least 1.
        dtype: Of the result, None for that of the generators. In a narrower one the products of large blocks are
            rounded too (README.md, "Rounded results"): D is off by little more than its own rounding.

    Returns:
        D of shape ``(n, block_size, block_size)`` in ``dtype``.

    Raises:
        ValueError: The generators do not fit the block size, or the order is below 1.
    """
    check_generators(generators, block_size)
    check_order(order)
    dtype = dtype or generators.dtype
    displacement = _cayley_neumann_generators if traced(generators) else CayleyNeumannFunction.apply
    return displacement(generators, block_size, order, dtype)
