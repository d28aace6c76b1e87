"""Unpacking of quantised weights: int8 in groups, and NF4 with or without double quantisation."""

from orthotrain.kernels.dequant.op import dequant_int8, dequant_nf4

__all__ = ["dequant_int8", "dequant_nf4"]
