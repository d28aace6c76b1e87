"""The public ``poet_linear``: an autograd function of eager mode on the CPU.

The route depends on values (how orthogonal the rotations are), so it cannot be traced. torch.compile and GPUs take the
fold with its own gradient; :func:`serves` tells which of the two is taken.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from orthotrain.kernels.block_batches import gram_deviation, inverts_by_transposing, largest_norm
from orthotrain.kernels.checks import check_sides
from orthotrain.kernels.dispatch import plain_cpu, traced
from orthotrain.kernels.fold import fold
from orthotrain.kernels.operation import without_autocast
from orthotrain.kernels.outputs import Changes, unviewed
from orthotrain.kernels.poet_linear import cpu


class PoetLinearFunction(torch.autograd.Function):
    """``x W_eff^T`` of a folded weight; in backward both displacements get their gradients without ``dL/dW_eff``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        folded: Tensor,
        d_out: Tensor | None,
        d_in: Tensor | None,
        deviations: tuple[Tensor | None, Tensor | None],
        permutations: tuple[Tensor | None, Tensor | None],
    ) -> Tensor:
        """See :func:`poet_linear`."""
        y = unviewed(F.linear(x, folded))
        # nn.Linear allows changes of y in place; after one, y is computed again
        ctx.changes = Changes(y)
        ctx.save_for_backward(x, folded, y.data, d_out, d_in, *deviations, *permutations)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None, None, None]:
        """Return the gradients that are needed."""
        x, folded, y, d_out, d_in, e_out, e_in, permutation_out, permutation_in = ctx.saved_tensors
        need_x, _, need_out, need_in, *_ = ctx.needs_input_grad
        grad_x = grad_out = grad_in = None
        grad_y, inputs = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        with without_autocast(x.device.type):
            if need_x or need_in:
                grad_x = torch.mm(grad_y, folded)
            if need_in and grad_x is not None:
                grad_in = cpu.input_gradient(inputs, grad_x, d_in, e_in, permutation_in)
            if need_out:
                y = F.linear(x, folded) if ctx.changes.any() else y
                grad_out = cpu.output_gradient(y.reshape(-1, y.shape[-1]), grad_y, d_out, e_out, permutation_out)
        return (grad_x.view(x.shape) if grad_x is not None and need_x else None), None, grad_out, grad_in, None, None


def serves(x: Tensor) -> bool:
    """Tell whether :func:`poet_linear` differs from a fold before ``F.linear``: in eager mode on the CPU.

    The route depends on values. To read them a GPU would have to wait, and a trace has no values.
    """
    return plain_cpu(x) and not traced(x)


def poet_linear(
    x: Tensor,
    weight: Tensor,
    d_out: Tensor | None,
    d_in: Tensor | None,
    permutation_out: Tensor | None = None,
    permutation_in: Tensor | None = None,
) -> Tensor:
    """Return ``x W_eff^T`` with the weight of ``fold``; the rotations' gradients need no third large product.

    Differentiable in ``x`` and the displacements. Where ``I + D`` has no well-conditioned inverse, and where
    :func:`serves` is false, this is ``F.linear(x, fold(...))``, with the same gradients, formed from that of the
    weight. Autocast does not act inside.

    Args:
        x: Activations ``(..., in)``.
        weight: Frozen weight ``(out, in)`` in the permuted frame, dtype and device of ``x``.
        d_out: Output displacements ``(n, b, b)`` with ``n * b <= out``; None for no rotation.
        d_in: Input displacements ``(m, c, c)`` with ``m * c <= in``; None for no rotation.
        permutation_out: Permutation ``(out,)`` of the output side, int64, or of groups, ``(out / g,)``
            (:mod:`permutations`); or None.
        permutation_in: Permutation of the input side likewise.

    Returns:
        ``(..., out)`` in the natural order, in the dtype of ``x``.

    Raises:
        ValueError: If dtypes or devices differ, the blocks are not square or do not fit the weight, a permutation has
            another length or dtype, or the width of ``x`` is not that of the weight.
    """
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"poet_linear: x has {x.shape[-1]} features and the weight takes {weight.shape[1]}")
    if x.dtype != weight.dtype or x.device != weight.device:
        raise ValueError(
            f"poet_linear: x is {x.dtype} on {x.device} and the weight {weight.dtype} on {weight.device}; cast one"
        )
    sides, permutations = (d_out, d_in), (permutation_out, permutation_in)
    check_sides("poet_linear", weight, *sides, *permutations, x, "x")
    with without_autocast(x.device.type):
        deviations = _deviations(x, sides)
        if deviations is None:
            return F.linear(x, fold(weight, *sides, *permutations))
        constant_out, constant_in = (None if d is None else d.detach() for d in sides)
        folded = fold(weight, constant_out, constant_in, *permutations)
        return PoetLinearFunction.apply(x, folded, *sides, deviations, permutations)


def _deviations(x: Tensor, sides: tuple[Tensor | None, Tensor | None]) -> tuple[Tensor | None, ...] | None:
    """Return ``R^T R - I`` of each side that is inverted by transposing, None for a side that is inverted by solving.

    None for both where the gradients of the displacements are formed from that of the weight, or are not needed.
    """
    if not (serves(x) and torch.is_grad_enabled() and any(d is not None and d.requires_grad for d in sides)):
        return None
    deviations = [None if d is None else gram_deviation(d.detach()) for d in sides]
    norms = [0.0 if deviation is None else largest_norm(deviation) for deviation in deviations]
    if not all(cpu.invertible(norm) for norm in norms):
        return None
    pairs = zip(deviations, norms, strict=True)
    return tuple(deviation if inverts_by_transposing(norm, x.dtype) else None for deviation, norm in pairs)
