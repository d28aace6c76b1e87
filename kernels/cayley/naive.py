"""The definition of ``cayley``."""

import torch
from torch import Tensor


def cayley(skew: Tensor) -> Tensor:
    """Return ``D = (I + Q)(I - Q)^-1 - I`` of ``Q (n, b, b)``."""
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device)
    return (identity + skew) @ torch.linalg.inv(identity - skew) - identity
