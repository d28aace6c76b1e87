"""Frozen weights: matrices without gradient, their products, and their replacement in a merge."""

from abc import ABC, abstractmethod
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orthotrain.errors import ConfigurationError
from orthotrain.kernels.checks import COMPUTABLE
from orthotrain.layers.weights.rounding import Noise, stochastic_round


class NoTensor:
    """Stands where a layer of torch has its weight: code may read shape, dtype and device, but not the values.

    The values lack the rotation, so that a function of torch that took them would give a wrong result in silence.
    """

    @property
    def data(self) -> Self:
        """This object, for code that reads ``weight.data.device``."""
        return self

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        """Refuse a function of torch that is given this object.

        Raises:
            ConfigurationError: Naming the function.
        """
        raise ConfigurationError(
            f"{func.__name__} was given the frozen weight of a layer, which lacks the rotation: merge first "
            "(orthotrain.layers.unwrap_mergeables), or take merged_weight() of the layer"
        )


class FrozenWeight(NoTensor, nn.Module, ABC):
    """A matrix ``W (out, in)`` without gradient, whose state dict reloads exactly.

    A new storage format is a new subclass of this class and a case in :func:`store`.
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

    @property
    def shape(self) -> torch.Size:
        """``(out, in)``, which code around a layer reads as that of a parameter."""
        return torch.Size((self.out_features, self.in_features))

    @property
    def device(self) -> torch.device:
        """Device of the stored tensors."""
        return next(self.parameters()).device

    @abstractmethod
    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return ``W (out, in)`` in ``dtype``, None for :attr:`dtype` (the stored tensor where nothing is converted).

        In fp32 or wider the result has the full precision of the storage, whatever the dtype of products.
        """

    @abstractmethod
    def assign_(self, weight: Tensor, noise: Noise | None = None) -> None:
        """Store ``weight (out, in)`` in place; with noise, formats that round do so stochastically and unbiased."""

    def extra_repr(self) -> str:
        """Describe the shape in one line."""
        return f"{self.out_features}, {self.in_features}"


class DenseWeight(FrozenWeight):
    """A floating-point frozen weight, fp32, bf16, fp16 or fp64.

    ``values`` is a parameter without gradient and not a buffer, so that DDP does not broadcast it every step and
    sharding strategies shard it.

    Args:
        weight: ``(out, in)``. The tensor itself is kept where its layout allows, so that wrapping a large model
            takes no second copy. A merge writes into this tensor, and captured graphs continue to read it.

    Raises:
        ConfigurationError: If the weight has a dtype that products are not computed in.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__(*weight.shape)
        check_storable(weight)
        self.values = nn.Parameter(weight.detach().contiguous(), requires_grad=False)

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
    """Refuse a weight in a dtype that products are not computed in: integers, complex or 8-bit numbers.

    Raises:
        ConfigurationError: Naming shape and dtype, and dtypes that would work.
    """
    if weight.dtype not in COMPUTABLE:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in COMPUTABLE)
        shape = tuple(weight.shape)
        raise ConfigurationError(
            f"a weight {shape} in {weight.dtype}: take {known}; cast the weight, or exclude its layer"
        )


def plain_linear(weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    """Return an ``nn.Linear`` with ``weight (out, in)`` and ``bias (out,)``, neither of them copied."""
    linear = nn.utils.skip_init(
        nn.Linear, weight.shape[1], weight.shape[0], bias=False, device=weight.device, dtype=weight.dtype
    )
    linear.weight = nn.Parameter(weight)
    linear.bias = bias
    return linear
