from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from orthotrain.kernels.skew import skew


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def generators_of_norm() -> Callable[..., Tensor]:
    """Random fp64 generators whose blocks all have the given spectral norm ||Q||_2."""

    def make(blocks: int, block_size: int, norm: float, seed: int = 0) -> Tensor:
        shape = (blocks, block_size * (block_size - 1) // 2)
        random = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return random * (norm / torch.linalg.matrix_norm(skew(random, block_size), ord=2)).unsqueeze(1)

    return make


@pytest.fixture
def orthogonality_defect() -> Callable[[Tensor], float]:
    """max|R^T R - I| from D, without forming R: the identity would hide what D has at small norms."""
    return lambda d: (d + d.mT + d.mT @ d).abs().max().item()
