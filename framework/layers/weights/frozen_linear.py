"""A frozen linear layer in place of layers that bitsandbytes has quantized and that are not wrapped.

A ``Linear4bit`` repacks its weight in the first evaluation on a CPU with AVX512-BF16. After that it gives its input no
gradient, and its state dict has other keys.
"""

from collections.abc import Container

import torch
from torch import Tensor, nn

from orthotrain.errors import ConfigurationError
from orthotrain.layers.weights.bitsandbytes_linear import adopt_bitsandbytes, compute_dtype_of
from orthotrain.layers.weights.frozen_weight import FrozenWeight, plain_linear


class FrozenLinear(nn.Module):
    """``y = x @ W.T + bias`` over a :class:`FrozenWeight`, without a rotation.

    Args:
        weight: The frozen weight ``(out, in)``.
        bias: ``(out,)``, or None; its ``requires_grad`` is not changed.
    """

    def __init__(self, weight: FrozenWeight, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.weight = weight
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``; always differentiable in ``x``."""
        return self.weight.matmul(x, self.bias)

    @torch.no_grad()
    def unwrap(self) -> nn.Linear:
        """Return an ``nn.Linear`` that computes the same, with its weight in the compute dtype of this layer."""
        return plain_linear(self.weight.dequantize(), self.bias)


def frozen_linears(model: nn.Module, without: Container[nn.Module] = ()) -> dict[nn.Module, FrozenLinear]:
    """Return the replacement of every quantized linear layer of bitsandbytes in a model; the model is not changed.

    Args:
        model: Any module.
        without: Layers to leave out, because something else replaces them.

    Raises:
        ConfigurationError: If a layer has a format that cannot be taken over, naming the layer.
    """
    replacements: dict[nn.Module, FrozenLinear] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or module in without:
            continue
        try:
            weight = adopt_bitsandbytes(module, compute_dtype_of(model))
        except ConfigurationError as error:
            raise ConfigurationError(f"layer {name}: {error}") from error
        if weight is not None:
            replacements[module] = FrozenLinear(weight, module.bias).train(module.training)
    return replacements
