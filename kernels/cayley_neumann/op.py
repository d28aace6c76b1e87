"""The public ``cayley_neumann``: skew blocks and series in one operation, which saves only the generators."""

import torch
from torch import Tensor

from orthotrain.kernels.checks import check_generators
from orthotrain.kernels.operation import operation


def _fake(generators: Tensor, block_size: int, order: int, dtype: torch.dtype) -> Tensor:
    return generators.new_empty(generators.shape[0], block_size, block_size, dtype=dtype)


_cayley_neumann = operation("cayley_neumann", ["generators"], fake=_fake, saved=["generators", "order"])


def cayley_neumann(generators: Tensor, block_size: int, order: int, dtype: torch.dtype | None = None) -> Tensor:
    """Return the displacement of the Cayley-Neumann rotation, D = 2Q + 2Q^2 + ... + 2Q^order + Q^(order+1).

    This is (I + Q)(I + Q + ... + Q^order) - I (POET's CNP, arXiv:2506.08001) with ``Q = skew(generators, block_size)``.
    Autocast does not act inside: half-precision inputs are computed in fp32 and rounded once. Q is a transient of both
    passes: only the generators, which a layer holds anyway, are saved for backward.

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
    check_generators("cayley_neumann", generators, block_size)
    if order < 1:
        raise ValueError(f"order must be at least 1, got {order}")
    return _cayley_neumann(generators, block_size, order, dtype or generators.dtype)
