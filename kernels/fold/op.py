"""The public ``fold``. Its backward contracts the gradient of the weight to diagonal blocks and drops it."""

from torch import Tensor

from orthotrain.kernels.checks import check_sides
from orthotrain.kernels.operation import operation

_fold = operation("fold", ["d_out", "d_in"], permutations=["permutation_out", "permutation_in"])


def fold(
    weight: Tensor,
    d_out: Tensor | None,
    d_in: Tensor | None,
    permutation_out: Tensor | None = None,
    permutation_in: Tensor | None = None,
) -> Tensor:
    """Fold both rotations into a frozen weight: ``W_eff[permutation_out][:, permutation_in] = R_out^T W R_in^T``.

    Differentiable in the displacements only: the weight is frozen by definition. The gradient of the result is a
    transient of the backward pass, contracted to diagonal blocks at once. Autocast does not act inside.

    Args:
        weight: Frozen weight ``(out, in)`` in the permuted frame.
        d_out: Output displacements ``(n, b, b)`` with ``n * b <= out``; None for no rotation.
        d_in: Input displacements ``(m, c, c)`` with ``m * c <= in``; None for no rotation.
        permutation_out: Permutation ``(out,)`` of the output side, int64, or of groups, ``(out / g,)``
            (:mod:`permutations`); or None.
        permutation_in: Permutation of the input side likewise.

    Returns:
        The effective weight ``(out, in)`` in the natural frame, in the dtype of ``weight``.

    Raises:
        ValueError: If dtypes or devices differ, the blocks are not square or do not fit the weight, or a permutation
            has another length or dtype; with ``ORTHOTRAIN_DEBUG=1`` also if it is no permutation.
    """
    check_sides("fold", weight, d_out, d_in, permutation_out, permutation_in, weight, "the weight")
    return _fold(weight, d_out, d_in, permutation_out, permutation_in)
