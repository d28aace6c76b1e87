"""Skew blocks with all singular values brought to about 1: the direction of a step on the Lie algebra."""

import torch
from torch import Tensor

from orthotrain.kernels.skew.cpu import skew_backward, skew_forward

# Quintic of Muon (Jordan et al., 2024): it takes singular values of (0, 1] to about [0.7, 1.2] in five steps.
QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalize(generators: Tensor, block_size: int, steps: int = 5) -> Tensor:
    """Bring the singular values of skew blocks to about 1, those that are not negligible beside the largest.

    The iteration runs in bf16 on every device, as Muon's does: its aim is a band, and the direction of random blocks
    differs by a cosine of 0.9999 from that in fp32, in a quarter of the time. Rounding leaves the iterates a little off
    the skew matrices; what is returned is their skew part.

    Args:
        generators: ``(n, b(b-1)/2)``.
        block_size: Size b.
        steps: Iterations of the quintic ``X <- a X + b (X X^T) X + c (X X^T)^2 X``; for skew X it is
            ``X (a - b X^2 + c X^4)``.

    Returns:
        Generators of the same shape, fp32. Zero blocks stay zero.
    """
    # singular values of a skew matrix come in pairs: the largest is at most ||X||_F / sqrt(2), the generators' norm
    unit = generators.float() / generators.float().norm(dim=1, keepdim=True).clamp_min(1e-30)
    x = skew_forward(unit.to(torch.bfloat16), block_size)
    a, b, c = QUINTIC
    for _ in range(steps):
        square = torch.bmm(x, x)
        x = torch.baddbmm(x, x, torch.baddbmm(square, square, square, beta=-b, alpha=c), beta=a)
    return skew_backward(x.float()) / 2
