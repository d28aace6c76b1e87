"""Seeds derived from names. Every rank draws the same numbers, so nothing has to be broadcast."""

import hashlib
import random

import numpy as np
import torch
from torch import Tensor


def derive_seed(*parts: str | int) -> int:
    """Hash the parts into a 63-bit seed, which is equal on every machine, rank and Python version."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*parts: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator seeded with :func:`derive_seed`.

    A CUDA device gets a generator of its own, every other device a generator of the CPU. Draws of a CPU generator are
    equal everywhere. Draws of a CUDA generator are faster, and equal on all GPUs of one model. A caller passes
    ``device=generator.device`` to each draw, because the default device may be another.
    """
    place = torch.device(device) if torch.device(device).type == "cuda" else torch.device("cpu")
    return torch.Generator(place).manual_seed(derive_seed(*parts))


def draw_permutation(features: int, *parts: str | int) -> Tensor:
    """Draw a permutation ``(features,)``, int64, on the CPU, with a seed from the parts."""
    return torch.randperm(features, generator=generator(*parts), device="cpu")


def seed_draws(*parts: str | int) -> None:
    """Seed the global generators of torch (on all devices), numpy and Python with a seed from the parts."""
    seed = derive_seed("draws", *parts)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - other libraries draw from the global generator
    random.seed(seed)
