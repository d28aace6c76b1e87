"""The spectrum of a weight: what orthogonal training keeps, and how to give it back to a weight that rounding moved."""

import torch
from torch import Tensor


@torch.no_grad()
def singular_values(weight: Tensor) -> Tensor:
    """Return the singular values of ``weight (out, in)``, descending, ``(min(out, in),)`` in fp32 or wider."""
    return torch.linalg.svdvals(weight.to(torch.promote_types(weight.dtype, torch.float32)))


def spectral_drift(values: Tensor, start: Tensor) -> float:
    """Return ``max_i |s_i - s_i(start)| / s_1(start)`` for descending singular values ``(r,)``."""
    return float((values - start).abs().max() / start[0])


@torch.no_grad()
def with_spectrum(weight: Tensor, values: Tensor) -> Tensor:
    """Return the matrix of given singular values that is nearest to ``weight`` in the Frobenius norm.

    With ``weight = U S V^T`` it is ``U diag(values) V^T`` (Mirsky, 1960: the values in the same order).

    Args:
        weight: ``(out, in)``, fp32 or wider.
        values: ``(min(out, in),)``, descending.
    """
    left, _, right = torch.linalg.svd(weight, full_matrices=False)
    return (left * values.to(weight.dtype)) @ right


def svd_entropy(values: Tensor) -> Tensor:
    """Return the normalised SVD entropy of singular values ``(..., r)``: 1 for a flat spectrum, 0 for rank one.

    ``H = -sum_i p_i log(p_i) / log(r)`` with ``p_i = s_i^2 / sum_j s_j^2`` (Alter, Brown and Botstein, 2000).
    """
    energy = values.double().square()
    share = energy / energy.sum(-1, keepdim=True).clamp_min(1e-300)
    return torch.special.entr(share).sum(-1) / torch.log(torch.tensor(float(max(2, values.shape[-1]))))
