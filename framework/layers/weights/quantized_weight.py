"""Frozen weights in 4 and 8 bits, whose packed tensors reload bit for bit."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from orthotrain.errors import ConfigurationError
from orthotrain.layers.checks import check_divides
from orthotrain.layers.weights.frozen_weight import FrozenWeight
from orthotrain.layers.weights.nf4_and_int8 import pack_int8, pack_nf4, quant_state_tensors
from orthotrain.layers.weights.quantized_product import dequantize, quantized_product
from orthotrain.layers.weights.rounding import Noise


class QuantizedWeight(FrozenWeight):
    """A packed ``W (out, in)``. The packed tensors are parameters without gradient, and reload bit for bit.

    Casting the module (``.to(torch.bfloat16)``, ``.half()``) changes ``compute_dtype``, but not the fp32 statistics,
    which are part of the stored values.

    Args:
        shape: ``(out, in)``.
        group_size: Values that share one scale.
        compute_dtype: Floating-point dtype that ``dequantize()`` returns and that ``matmul`` computes in.
        stored: The packed tensors by name, in the order of the storage format.
    """

    format: ClassVar[str]

    def __init__(
        self, shape: Sequence[int], group_size: int, compute_dtype: torch.dtype, stored: dict[str, Tensor]
    ) -> None:
        super().__init__(*shape)
        self.group_size = group_size
        self.compute_dtype = compute_dtype
        for name, tensor in stored.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    @abstractmethod
    def quantize(self, weight: Tensor, noise: Noise | None = None) -> dict[str, Tensor]:
        """Return the packed tensors of ``weight (out, in)`` by name."""

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return ``x @ W.T + bias``, ``(..., in) -> (..., out)``; saves nothing but the packed weight for backward.

        ``x`` is cast to ``compute_dtype``, ``W`` is rounded to it once, and the result has the dtype of ``x``. Under
        autocast all three have the dtype of autocast, as in nn.Linear.
        """
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else self.compute_dtype
        bias = None if bias is None else bias.to(dtype)
        stored = self._stored()
        y = quantized_product(x.to(dtype), bias, stored, self.format, self.group_size, self.out_features, False)
        return y if autocast else y.to(x.dtype)

    @property
    def packed_numbers(self) -> int:
        """Numbers of the weight, of which the stored tensors hold several in a byte."""
        return self.out_features * self.in_features

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype."""
        return self.compute_dtype

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return a new ``W (out, in)`` in ``dtype``, None for ``compute_dtype``; formed in fp32 and rounded once."""
        shape = [self.out_features, self.in_features]
        return dequantize(self._stored(), self.format, self.group_size, shape, dtype or self.compute_dtype)

    @torch.no_grad()
    def assign_(self, weight: Tensor, noise: Noise | None = None) -> None:
        """Quantize and store ``weight (out, in)``; with noise, formats that can round stochastically do so."""
        for name, tensor in self.quantize(weight, noise).items():
            getattr(self, name).copy_(tensor)

    @torch.no_grad()
    def relative_error(self, weight: Tensor) -> float:
        """Return ``||W - weight|| / ||weight||`` (Frobenius, fp32): the error of storing ``weight (out, in)``."""
        exact = weight.float()
        return float((self.dequantize(torch.float32) - exact).norm() / exact.norm().clamp_min(1e-30))

    def extra_repr(self) -> str:
        """Describe shape, group size and dtype in one line."""
        return f"{super().extra_repr()}, group_size={self.group_size}, compute_dtype={self.compute_dtype}"

    def _stored(self) -> list[Tensor]:
        return [p for p in self._parameters.values() if p is not None]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        statistics = {n: p.detach() for n, p in self.named_parameters(recurse=False) if p.is_floating_point()}
        cast = fn(torch.empty(0, dtype=self.compute_dtype, device=self._stored()[0].device))
        super()._apply(fn, recurse)
        self.compute_dtype = cast.dtype
        for name, before in statistics.items():
            parameter = getattr(self, name)
            if parameter.dtype != before.dtype:
                parameter.data = before.to(parameter.device)
        return self


class Nf4Weight(QuantizedWeight):
    """4-bit NormalFloat with a scale for every ``group_size`` values in memory order (arXiv:2305.14314, section 3).

    Double quantization stores the scales in 8 bits, in groups of 256 around their mean: 4.13 bits a value in place of
    4.5. bitsandbytes packs and unpacks, on the CPU and on CUDA. The state dict is our own, because the state dict of
    ``Linear4bit`` does not reload.

    Args:
        weight: ``(out, in)`` in fp32, bf16 or fp16; ``in`` even.
        group_size: A power of two from 32 to 4096; None for 64, as in the paper.
        double_quantization: Whether the scales are quantized too.

    Raises:
        ConfigurationError: For a dtype, width or group size that NF4 does not have, naming it.
    """

    format = "nf4"

    def __init__(self, weight: Tensor, *, group_size: int | None = None, double_quantization: bool = True) -> None:
        group_size = 64 if group_size is None else group_size
        if group_size not in (32, 64, 128, 256, 512, 1024, 2048, 4096):
            raise ConfigurationError(f"group_size={group_size!r}: NF4 takes a power of two from 32 to 4096")
        super().__init__(weight.shape, group_size, weight.dtype, pack_nf4(weight, group_size, double_quantization))

    @classmethod
    def from_quant_state(cls, packed: Tensor, state: Any) -> Self:
        """Copy a weight that bitsandbytes has quantized, without requantization: every value stays the same.

        Args:
            packed: Data of a ``bitsandbytes.nn.Params4bit``, any storage dtype.
            state: Its ``quant_state``, NF4.

        Raises:
            ConfigurationError: If the weight is not plain NF4, naming its format.
        """
        adopted = cls.__new__(cls)
        stored = quant_state_tensors(packed, state)
        QuantizedWeight.__init__(adopted, state.shape, state.blocksize, state.dtype, stored)
        return adopted

    def quantize(self, weight: Tensor, noise: Noise | None = None) -> dict[str, Tensor]:
        """Return the packed tensors of ``weight (out, in)``; with noise rounded stochastically."""
        # a network in fp64 folds in fp64, which bitsandbytes does not take
        weight = weight.float() if weight.dtype == torch.float64 else weight
        return pack_nf4(weight, self.group_size, "nested_absmax" in self._parameters, noise)


class Int8Weight(QuantizedWeight):
    """8-bit integers with one fp32 scale for every ``group_size`` inputs of a row: ``W = codes * scales``.

    Symmetric: the largest magnitude of a group has code 127. The format is not one of bitsandbytes: the non-linear code
    of its blockwise format has a larger error on Gaussian weights (1.08% against 0.70%), its row-wise format takes fp16
    only, and neither rounds stochastically.

    Args:
        weight: ``(out, in)``, any floating dtype.
        group_size: Inputs that share a scale; must divide ``in``. None for 256 (arXiv:2603.05500, POET-XQ), or where
            256 does not divide ``in`` the largest power of two that does, if that is at least 32.

    Raises:
        ConfigurationError: If the weight is not floating point, or the group size does not divide ``in``, naming the
            divisors near it.
    """

    format = "int8"

    def __init__(self, weight: Tensor, *, group_size: int | None = None) -> None:
        in_features = weight.shape[1]
        group_size = default_group_size(in_features) if group_size is None else group_size
        check_divides("group_size", group_size, in_features, f"the {in_features} inputs of the weight")
        super().__init__(weight.shape, group_size, weight.dtype, pack_int8(weight, group_size))

    @classmethod
    def from_codes(cls, codes: Tensor, scales: Tensor, compute_dtype: torch.dtype) -> Self:
        """Copy ``codes (out, in)`` int8 and ``scales (out, groups)`` fp32, as :class:`Int8Weight` stores them."""
        adopted = cls.__new__(cls)
        stored = {"codes": codes.detach().clone(), "scales": scales.detach().clone()}
        QuantizedWeight.__init__(adopted, codes.shape, codes.shape[1] // scales.shape[1], compute_dtype, stored)
        return adopted

    def quantize(self, weight: Tensor, noise: Noise | None = None) -> dict[str, Tensor]:
        """Return codes and scales of ``weight (out, in)``; with noise rounded stochastically, unbiased."""
        return pack_int8(weight, self.group_size, noise)


def default_group_size(in_features: int) -> int:
    """Return int8's group size for rows of ``in_features``: 256, or the largest power of two that divides them.

    The scales of groups below 32 would take more than an eighth of the memory of the codes. For such widths the result
    is 256, which does not divide them and is refused like any other size.
    """
    power = min(256, in_features & -in_features)
    return power if power >= 32 else 256
