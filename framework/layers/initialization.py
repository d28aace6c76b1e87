"""Initial values of a frozen weight that is never trained: its spectrum is kept for the whole run."""

from typing import Literal

import torch
from torch import Tensor

from orthotrain.errors import check_choice

Initialization = Literal["normalized", "standard", "keep"]


@torch.no_grad()
def initialize_(weight: Tensor, scheme: Initialization, generator: torch.Generator) -> None:
    """Fill ``weight (out, in)`` in place (arXiv:2506.08001, section 4: the normalised Gaussian is the best).

    Args:
        weight: Filled in its own dtype; drawn in fp32 on the CPU, so that every device and rank holds the same.
        scheme: ``normalized``: Gaussian rows divided by their norm. ``standard``: Gaussian of standard deviation 0.02.
            ``keep``: leave it (for pretrained weights).
        generator: CPU generator.

    Raises:
        ConfigurationError: If the scheme is unknown.
    """
    check_choice("init", scheme, Initialization)
    if scheme == "keep" or weight.is_meta:
        return
    values = torch.randn(weight.shape, generator=generator, dtype=torch.float32)
    if scheme == "normalized":
        values /= values.norm(dim=1, keepdim=True)
    else:
        values *= 0.02
    weight.copy_(values)
