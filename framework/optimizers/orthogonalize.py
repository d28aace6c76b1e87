"""Brings all singular values of skew blocks to about 1, for the direction of a step on the Lie algebra."""

import math

import torch
from torch import Tensor

from orthotrain.kernels.skew.cpu import skew_backward, skew_forward

SMALLEST, CUSHION, MARGIN = 6e-4, 0.05, 0.01
"""From these the quintics follow (docs/pages/design/index.md): smallest singular value that is brought to 1, smallest
share of the largest value that a step may leave of a value that was large, and allowance for rounding to bf16."""

QUINTICS = (
    (6.68552, -17.8113, 12.6195),
    (4.01612, -3.86109, 0.987192),
    (4.01612, -3.86109, 0.987192),
    (4.01612, -3.86109, 0.987192),
    (2.83113, -2.24186, 0.535958),
    (1.97179, -1.34067, 0.374504),
)
"""Coefficients (a, b, c) of the steps ``x <- a x + b x^3 + c x^5``. Together they bring [6e-4, 1] into [0.98, 1.02]."""


def orthogonalize(generators: Tensor, block_size: int) -> Tensor:
    """Bring the singular values of skew blocks to 1, except those that are negligible beside the largest.

    Each step applies an odd quintic to the singular values: the one with the least largest distance from 1 on the
    interval in which the steps before have left them (minimax; Polar Express, arXiv:2505.16932, has the idea). The
    block is first divided by ``s = 1.01 (||X^4||_F / sqrt(2))^(1/4)``. Singular values of a skew block come in pairs,
    so that s is at least the largest of them, and at most ``1.01 (b/2)^(1/8)`` times the largest.

    A singular value of at most 1e-3 of the largest is negligible: it ends between 0 and 1.03, and rounding of the
    moment to bf16 decides on its plane. In blocks of 8 and 16 this rounding also hides some values up to 2e-3. All
    others end within 0.05 of 1 (tests/benchmarks/results/angles.json: blocks up to 1,024, random and of decaying
    spectra).

    The iteration runs in bf16 on every device, like Muon's. Rounding makes the iterates slightly non-skew. With
    ``X^T X`` in place of ``-X X`` this does no harm, because the singular values still go through the same quintics;
    the result is the skew part.

    Args:
        generators: ``(n, b(b-1)/2)``.
        block_size: Size b.

    Returns:
        Generators of the same shape, fp32. Zero blocks stay zero. A block of odd size keeps one singular value of 0.
    """
    given = generators.float()
    unit = given / given.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    x = skew_forward(unit.to(torch.bfloat16), block_size)
    square = torch.bmm(x.mT, x)
    factor = 1 / bounds(square)
    # the square may be off by the rounding of the factor: a step then sees singular values that are off by half as much
    x, square = x * factor.to(x.dtype), square * factor.square().to(x.dtype)
    for step, (a, b, c) in enumerate(QUINTICS):
        square = torch.bmm(x.mT, x) if step else square
        x = torch.baddbmm(x, x, torch.baddbmm(square, square, square, beta=b, alpha=c), beta=a)
    return skew_backward(x.float()) / 2


def bounds(squares: Tensor) -> Tensor:
    """Return a bound of the singular values of each block X from ``X^T X``: ``(n, b, b)`` to ``(n, 1, 1)`` in fp32."""
    fourth = torch.bmm(squares, squares)
    norm = torch.linalg.vector_norm(fourth, dim=(1, 2), keepdim=True, dtype=torch.float32)
    # blocks have an entry of 1, so their bound is above 1; that of a block of zeros must not divide by 0
    return (1 + MARGIN) * (norm / math.sqrt(2)).clamp_min(0.5) ** 0.25
