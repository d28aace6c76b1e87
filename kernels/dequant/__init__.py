"""Unpacking of quantized weights: int8 in groups, and NF4 with or without double quantization."""

from orthotrain.kernels.dequant.op import dequant_int8, dequant_nf4

__all__ = ["dequant_int8", "dequant_nf4"]
