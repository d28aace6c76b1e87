"""Seeds derived from names, so that every rank draws the same numbers and nothing is broadcast."""

import hashlib
import random

import numpy as np
import torch
from torch import Tensor


def derive_seed(*parts: str | int) -> int:
    """Hash the parts into a 63-bit seed: equal on every machine, rank and Python version."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*parts: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator seeded with :func:`derive_seed`, of the CPU unless another device is named.

    Draws on the CPU are the same for every device; those on a GPU are the same on every GPU of one model, and there
    they are fast. Devices other than GPUs of CUDA have a generator of the CPU. Whoever draws names the generator's
    device (``device=generator.device``): the default device may be another.
    """
    kind = torch.device(device) if torch.device(device).type == "cuda" else torch.device("cpu")
    return torch.Generator(kind).manual_seed(derive_seed(*parts))


def draw_permutation(features: int, *parts: str | int) -> Tensor:
    """Draw a permutation ``(features,)``, int64, on the CPU, from the hash of the parts."""
    return torch.randperm(features, generator=generator(*parts), device="cpu")


def seed_draws(*parts: str | int) -> None:
    """Seed the global generators of torch (all devices), numpy and Python from the hash of the parts."""
    seed = derive_seed("draws", *parts)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the global one is what others draw from
    random.seed(seed)
