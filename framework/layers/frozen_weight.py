"""Frozen weights: how a matrix that is never trained is stored, multiplied with and replaced by a merge."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FrozenWeight(nn.Module, ABC):
    """A matrix ``W (out, in)`` without gradient that owns its state: what it saves is what it reloads.

    A new storage format is one new subclass of this class and nothing else.
    """

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.out_features = out_features
        self.in_features = in_features

    @abstractmethod
    def matmul(self, x: Tensor) -> Tensor:
        """Return ``x @ W.T``, ``(..., in) -> (..., out)``; differentiable in ``x``."""

    @abstractmethod
    def dequantize(self) -> Tensor:
        """Return ``W (out, in)`` as a floating-point tensor (the stored one where there is nothing to convert)."""

    @abstractmethod
    def assign_(self, weight: Tensor, generator: torch.Generator | None = None) -> None:
        """Store ``weight (out, in)``; with a generator, formats that round do so stochastically (unbiased)."""

    def extra_repr(self) -> str:
        """Describe the shape in one line."""
        return f"{self.out_features}, {self.in_features}"


class DenseWeight(FrozenWeight):
    """A floating-point frozen weight, fp32, bf16, fp16 or fp64.

    ``values`` is a parameter without gradient and not a buffer, so that DDP does not broadcast it every step and
    sharding strategies shard it.

    Args:
        weight: ``(out, in)``; a copy is stored in its dtype, or in ``dtype``.
        dtype: Storage dtype, None for that of ``weight``.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype | None = None) -> None:
        super().__init__(*weight.shape)
        stored = weight.detach().to(dtype or weight.dtype, copy=True).contiguous()
        self.values = nn.Parameter(stored, requires_grad=False)

    def matmul(self, x: Tensor) -> Tensor:
        """Return ``x @ W.T``, ``(..., in) -> (..., out)``; autocast applies as in nn.Linear."""
        return F.linear(x, self.values)

    def dequantize(self) -> Tensor:
        """Return the stored matrix itself, ``(out, in)``."""
        return self.values

    @torch.no_grad()
    def assign_(self, weight: Tensor, generator: torch.Generator | None = None) -> None:
        """Store ``weight (out, in)``; into bf16 by stochastic rounding if a generator is given, else to nearest."""
        if self.values.dtype == torch.bfloat16 and generator is not None:
            weight = stochastic_round(weight, generator)
        self.values.copy_(weight)


def stochastic_round(x: Tensor, generator: torch.Generator) -> Tensor:
    """Round fp32 to bf16 up or down with the probability that makes the expectation exact.

    bf16 is the upper half of fp32: adding 16 random bits below it and cutting them off carries with just that
    probability. Exactly representable values stay as they are; infinities and NaN pass unchanged.

    Args:
        x: fp32 (or wider, then first rounded to fp32), any shape.
        generator: A CPU generator; the bits are drawn on the CPU, so that every device rounds alike.
    """
    bits = x.float().contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, generator=generator, dtype=torch.int32)
    rounded = torch.bitwise_and(bits + noise.to(bits.device), -(1 << 16)).view(torch.float32)
    return torch.where(torch.isfinite(x), rounded, x).to(torch.bfloat16)
