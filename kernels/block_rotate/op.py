"""The public ``block_rotate``."""

from torch import Tensor

from orthotrain.kernels.checks import check_blocks, check_permutation
from orthotrain.kernels.operation import operation

_block_rotate = operation("block_rotate", ["x", "displacement"], permutations=["gather", "scatter"])


def block_rotate(
    x: Tensor, displacement: Tensor, gather: Tensor | None = None, scatter: Tensor | None = None
) -> Tensor:
    """Rotate blocks of the last axis: ``z = x[..., gather]``, ``z_k += z_k @ D_k``, ``y[..., scatter] = z``.

    A rotation in the frame of a permutation ``p`` is ``gather=p, scatter=p``; a layer that keeps its weight in the
    permuted frame needs only ``gather`` on its input side and ``scatter`` on its output side. Autocast does not act
    inside.

    Args:
        x: Activations ``(..., d)``.
        displacement: ``D = R - I`` of ``n`` blocks, ``(n, b, b)``, ``n * b <= d``; same dtype and device as ``x``.
            The last ``d - n * b`` coordinates pass unchanged.
        gather: Permutation ``(d,)``, int64, or of groups of neighbors, ``(d / g,)`` (:mod:`permutations`), by
            which ``x`` is read; None for the identity.
        scatter: Permutation by which the result is written, or None.

    Returns:
        ``(..., d)`` in the dtype of ``x``; the sum ``x + x D`` is accumulated in fp32 for 16-bit inputs.

    Raises:
        ValueError: If dtypes or devices differ, the blocks are not square or do not fit in ``d``, or a permutation
            has another length or dtype; with ``ORTHOTRAIN_DEBUG=1`` also if it is no permutation.
    """
    width = x.shape[-1]
    check_blocks("block_rotate", "displacement", displacement, x, "x", width)
    check_permutation("block_rotate", "gather", gather, width, x)
    check_permutation("block_rotate", "scatter", scatter, width, x)
    return _block_rotate(x, displacement, gather, scatter)
