"""Frozen weights: how a matrix that is never trained is stored, multiplied with and replaced by a merge."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orthotrain.errors import ConfigurationError
from orthotrain.kernels.checks import COMPUTABLE
from orthotrain.layers.weights.rounding import Noise, stochastic_round


class FrozenWeight(nn.Module, ABC):
    """A matrix ``W (out, in)`` without gradient that owns its state: what it saves is what it reloads.

    A new storage format is one new subclass of this class and nothing else.
    """

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.out_features = out_features
        self.in_features = in_features

    @abstractmethod
    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``x @ W.T + bias``, ``(..., in) -> (..., out)``; differentiable in ``x`` and ``bias``."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Dtype that products are computed in without autocast."""

    @abstractmethod
    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return ``W (out, in)`` in ``dtype``, None for :attr:`dtype` (the stored tensor where nothing is converted).

        In fp32 or wider it is all that is stored, whatever the dtype of products.
        """

    @abstractmethod
    def assign_(self, weight: Tensor, noise: Noise | None = None) -> None:
        """Store ``weight (out, in)`` in place; with noise, formats that round do so stochastically (unbiased)."""

    def extra_repr(self) -> str:
        """Describe the shape in one line."""
        return f"{self.out_features}, {self.in_features}"


class DenseWeight(FrozenWeight):
    """A floating-point frozen weight, fp32, bf16, fp16 or fp64.

    ``values`` is a parameter without gradient and not a buffer, so that DDP does not broadcast it every step and
    sharding strategies shard it.

    Args:
        weight: ``(out, in)``; held itself and not copied where dtype and layout allow, so that wrapping a large model
            takes no second copy of it. A merge writes into it: a captured graph goes on reading the same memory.
        dtype: Storage dtype, None for that of ``weight``.

    Raises:
        ConfigurationError: If the weight has a dtype that products are not computed in.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype | None = None) -> None:
        super().__init__(*weight.shape)
        check_storable(weight)
        self.values = nn.Parameter(weight.detach().to(dtype or weight.dtype).contiguous(), requires_grad=False)

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``x @ W.T + bias``, ``(..., in) -> (..., out)``; autocast applies as in nn.Linear."""
        return F.linear(x, self.values, bias)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the stored matrix."""
        return self.values.dtype

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the stored matrix itself ``(out, in)``, or a copy of it in another ``dtype``."""
        return self.values if dtype is None else self.values.to(dtype)

    @torch.no_grad()
    def assign_(self, weight: Tensor, noise: Noise | None = None) -> None:
        """Store ``weight (out, in)`` in place; into bf16 by stochastic rounding if noise is given, else to nearest."""
        if self.values.dtype == torch.bfloat16 and noise is not None:
            weight = stochastic_round(weight, noise)
        self.values.copy_(weight)


def check_storable(weight: Tensor) -> None:
    """Refuse a weight of integers, complex or 8-bit numbers, which no product is computed in.

    Raises:
        ConfigurationError: Naming shape, dtype and what would work.
    """
    if weight.dtype not in COMPUTABLE:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in COMPUTABLE)
        shape = tuple(weight.shape)
        raise ConfigurationError(f"a weight {shape} in {weight.dtype}: takes {known}; cast it, or leave its layer out")


def plain_linear(weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    """Return an ``nn.Linear`` that holds ``weight (out, in)`` and ``bias (out,)`` themselves, without a copy."""
    linear = nn.utils.skip_init(
        nn.Linear, weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype
    )
    linear.weight = nn.Parameter(weight)
    linear.bias = bias
    return linear
