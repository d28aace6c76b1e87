"""The definition of ``oft_linear``, with a full matrix."""

from torch import Tensor

from orthotrain.kernels.block_rotate.naive import block_rotate


def oft_linear(x: Tensor, weight: Tensor, displacement: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``(x R) W^T + bias``, ``(..., out)``, with ``R = I + Diag(D_1 .. D_n)``."""
    y = block_rotate(x, displacement) @ weight.T
    return y if bias is None else y + bias
