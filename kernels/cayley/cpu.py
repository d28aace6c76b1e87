"""Exact Cayley displacement in PyTorch for the CPU; README.md derives it and its gradient."""

import torch
from torch import Tensor

from orthotrain.kernels.block_batches import in_parts, solve_blocks


def cayley_forward(skew: Tensor) -> Tensor:
    """Return D = 2Q (I - Q)^-1, shape ``(n, b, b)``, from Q of the same shape and dtype."""
    dtype = torch.promote_types(skew.dtype, torch.float32)
    identity = torch.eye(skew.shape[-1], dtype=dtype, device=skew.device)

    def part(skew: Tensor) -> Tensor:
        q = skew.to(dtype)
        # Every singular value of I - Q is sqrt(1 + theta^2) >= 1: no error can occur, so none is checked and the
        # host does not wait. Solving from the right (the factors commute) leaves the result row-major.
        return solve_blocks(identity - q, 2 * q, left=False).to(skew.dtype)

    return in_parts(part, skew, block_size=skew.shape[-1]).contiguous()


def cayley_backward(grad: Tensor, displacement: Tensor) -> Tensor:
    """Return dL/dQ = 2 S^T (dL/dD) S^T with S = (I - Q)^-1 = I + D/2, from D and dL/dD of shape ``(n, b, b)``."""
    dtype = torch.promote_types(displacement.dtype, torch.float32)

    def part(displacement: Tensor, grad: Tensor) -> Tensor:
        d, g = displacement.to(dtype).mT, grad.to(dtype)
        half = torch.baddbmm(g, d, g, alpha=0.5)
        return torch.baddbmm(half, half, d, beta=2).to(displacement.dtype)

    return in_parts(part, displacement, grad, block_size=displacement.shape[-1])
