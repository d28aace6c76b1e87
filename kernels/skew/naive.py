"""The definition of ``skew``."""

import torch
from torch import Tensor


def skew(generators: Tensor, block_size: int) -> Tensor:
    """Return Q, ``(n, b, b)``: generators ``(n, b(b-1)/2)`` above the diagonal row by row, their negatives below."""
    upper = generators.new_zeros(generators.shape[0], block_size, block_size)
    rows, columns = torch.triu_indices(block_size, block_size, offset=1, device=generators.device)
    upper[:, rows, columns] = generators
    return upper - upper.mT
