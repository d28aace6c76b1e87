"""The definition of ``cayley_neumann``."""

import torch
from torch import Tensor

from orthotrain.kernels.skew import naive


def cayley_neumann(generators: Tensor, block_size: int, order: int) -> Tensor:
    """Return ``D = (I + Q)(I + Q + ... + Q^order) - I``, ``(n, b, b)``, with Q from generators ``(n, b(b-1)/2)``."""
    q = naive.skew(generators, block_size)
    identity = torch.eye(block_size, dtype=q.dtype, device=q.device).expand_as(q)
    powers = [identity]
    for _ in range(order):
        powers.append(powers[-1] @ q)
    return (identity + q) @ sum(powers) - identity
