"""The public ``oft_linear``."""

from torch import Tensor

from orthotrain.kernels.checks import check_blocks
from orthotrain.kernels.operation import operation


def _fake(x: Tensor, weight: Tensor, *_: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


_oft_linear = operation("oft_linear", ["x", "displacement", "bias"], fake=_fake)


def oft_linear(x: Tensor, weight: Tensor, displacement: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``(x R) W^T + bias`` with ``R = I + Diag(D_1 .. D_n)``, differentiable in ``x``, ``D`` and the bias.

    Only the arguments are saved for backward, so layers that read one ``x`` share it. Autocast does not act inside.

    Args:
        x: Activations ``(..., in)``.
        weight: Frozen weight ``(out, in)`` on the device of ``x``; a weight of another dtype is cast for the product.
        displacement: ``D = R - I`` of ``n`` blocks, ``(n, b, b)``, ``n * b <= in``, dtype and device of ``x``.
        bias: ``(out,)``, cast likewise, or None.

    Returns:
        ``(..., out)`` in the dtype of ``x``.

    Raises:
        ValueError: If the displacement has another dtype, the blocks are not square or they do not fit, or the width of
            ``x`` is not that of the weight, or the choice is ``triton`` and the kernels do not serve ``x``.
    """
    check_blocks("oft_linear", "displacement", displacement, x, "x", x.shape[-1])
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"oft_linear: x has {x.shape[-1]} features and the weight takes {weight.shape[1]}")
    return _oft_linear(x, weight, displacement, bias)
