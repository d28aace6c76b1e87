"""The definition of ``poet_linear``."""

from torch import Tensor

from orthotrain.kernels.fold import naive


def poet_linear(
    x: Tensor,
    weight: Tensor,
    d_out: Tensor | None,
    d_in: Tensor | None,
    permutation_out: Tensor | None = None,
    permutation_in: Tensor | None = None,
) -> Tensor:
    """Return ``x W_eff^T``, ``(..., out)``, with the weight of ``fold``."""
    return x @ naive.fold(weight, d_out, d_in, permutation_out, permutation_in).T
