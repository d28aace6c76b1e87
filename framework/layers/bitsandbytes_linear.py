"""Taking over linear layers that bitsandbytes has quantised, as transformers' ``load_in_4bit`` leaves them."""

import sys
from typing import Any

import torch
from torch import nn

from orthotrain.errors import ConfigurationError
from orthotrain.layers.quantized_weight import Int8Weight, Nf4Weight, QuantizedWeight


def adopt_bitsandbytes(linear: nn.Linear) -> QuantizedWeight | None:
    """Copy the quantised weight of a bitsandbytes layer without requantising it.

    A ``Linear4bit`` keeps every value bit for bit. A ``Linear8bitLt`` becomes int8 with one group a row, equal to the
    last bit but one of fp32; its own product also quantises the activations, ours does not.

    Args:
        linear: Any ``nn.Linear``.

    Returns:
        The weight, with the compute dtype of the layer; None if the layer is not one of bitsandbytes.

    Raises:
        ConfigurationError: If the layer holds no quantised weight yet, or one in a format that cannot be taken over.
    """
    # a bitsandbytes layer cannot exist before bitsandbytes has been imported
    modules: Any = sys.modules.get("bitsandbytes.nn")
    if modules is None:
        return None
    if isinstance(linear, modules.Linear4bit):
        return _adopt_4bit(linear)
    if isinstance(linear, modules.Linear8bitLt):
        return _adopt_8bit(linear)
    return None


def _adopt_4bit(linear: Any) -> Nf4Weight:
    state = linear.weight.quant_state or linear.quant_state
    if state is None:
        raise ConfigurationError("this Linear4bit is not quantised yet: move it to its device first")
    weight = Nf4Weight.from_quant_state(linear.weight.data, state)
    weight.compute_dtype = linear.compute_dtype or state.dtype
    return weight


def _adopt_8bit(linear: Any) -> Int8Weight:
    if linear.state.has_fp16_weights:
        raise ConfigurationError("this Linear8bitLt keeps floating-point weights: build it with has_fp16_weights=False")
    codes, row_maxima = linear.weight.data, linear.weight.SCB
    if row_maxima is None:
        row_maxima = linear.state.SCB
    if codes.dtype != torch.int8 or row_maxima is None:
        raise ConfigurationError("this Linear8bitLt is not quantised yet: move it to its device first")
    compute_dtype = torch.float16 if linear.bias is None else linear.bias.dtype
    return Int8Weight.from_codes(codes, row_maxima.float().unsqueeze(1) / 127, compute_dtype)
