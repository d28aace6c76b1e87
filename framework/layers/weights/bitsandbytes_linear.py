"""Takes over linear layers that bitsandbytes has quantized, such as those of transformers' ``load_in_4bit``."""

import sys
from typing import Any

import torch
from torch import nn

from orthotrain.errors import ConfigurationError
from orthotrain.layers.weights.quantized_weight import Int8Weight, Nf4Weight, QuantizedWeight


def adopt_bitsandbytes(linear: nn.Linear, compute_dtype: torch.dtype | None = None) -> QuantizedWeight | None:
    """Copy the quantized weight of a bitsandbytes layer without requantizing it.

    The values of a ``Linear4bit`` stay the same bit for bit. A ``Linear8bitLt`` becomes int8 with one group in each
    row, equal up to the last bit of fp32. Its own product also quantizes the activations; the product of this package
    does not.

    Args:
        linear: Any ``nn.Linear``.
        compute_dtype: Dtype of products for a ``Linear8bitLt`` without bias, which has no compute dtype of its own;
            take :func:`compute_dtype_of` the network. None for torch's default dtype.

    Returns:
        The weight, with the compute dtype of the layer; None if the layer is not one of bitsandbytes.

    Raises:
        ConfigurationError: If the layer holds no quantized weight yet, or one in a format that cannot be taken over.
    """
    if not is_bitsandbytes(linear):
        return None
    if isinstance(linear, sys.modules["bitsandbytes.nn"].Linear4bit):
        return _adopt_4bit(linear)
    return _adopt_8bit(linear, compute_dtype)


def is_bitsandbytes(module: nn.Module) -> bool:
    """Tell whether a module is a ``Linear4bit`` or a ``Linear8bitLt``."""
    # no such layer exists before bitsandbytes is imported
    modules: Any = sys.modules.get("bitsandbytes.nn")
    return modules is not None and isinstance(module, (modules.Linear4bit, modules.Linear8bitLt))


def compute_dtype_of(model: nn.Module) -> torch.dtype | None:
    """Return the dtype of a model's first floating-point parameter, None if it has none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)


def _adopt_4bit(linear: Any) -> Nf4Weight:
    # a weight that was missing in the checkpoint is a plain parameter
    state = getattr(linear.weight, "quant_state", None) or linear.quant_state
    if state is None:
        raise ConfigurationError("this Linear4bit is not quantized yet: move it to its device first")
    weight = Nf4Weight.from_quant_state(linear.weight.data, state)
    weight.compute_dtype = linear.compute_dtype or state.dtype
    return weight


def _adopt_8bit(linear: Any, compute_dtype: torch.dtype | None) -> Int8Weight:
    if linear.state.has_fp16_weights:
        raise ConfigurationError("this Linear8bitLt keeps floating-point weights: build it with has_fp16_weights=False")
    codes, row_maxima = linear.weight.data, linear.weight.SCB
    if row_maxima is None:
        row_maxima = linear.state.SCB
    if codes.dtype != torch.int8 or row_maxima is None:
        raise ConfigurationError("this Linear8bitLt is not quantized yet: move it to its device first")
    own = compute_dtype or torch.get_default_dtype() if linear.bias is None else linear.bias.dtype
    return Int8Weight.from_codes(codes, row_maxima.float().unsqueeze(1) / 127, own)
