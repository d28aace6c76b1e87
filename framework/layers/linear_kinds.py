"""Which layers are linear layers: subclasses of nn.Linear that compute the same, and transposed ones (GPT-2)."""

import copy
import sys
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn import functional as F

from orthotrain.layers.weights.frozen_weight import plain_linear


def is_conv1d(module: nn.Module) -> bool:
    """Tell whether a module is a ``Conv1D`` of transformers: a linear layer with a transposed weight ``(in, out)``."""
    modules: Any = sys.modules.get("transformers.pytorch_utils")
    return modules is not None and type(module) is modules.Conv1D


def linear_sizes(layer: Any) -> tuple[int, int] | None:
    """Return the output and input width of a linear layer, None for another module."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    return (layer.nf, layer.nx) if is_conv1d(layer) else None


def as_linear(layer: Any) -> Any:
    """Return an ``nn.Linear`` with the transposed weight and the bias itself of a ``Conv1D``; another layer itself."""
    if not is_conv1d(layer):
        return layer
    return plain_linear(layer.weight.detach().T.contiguous(), layer.bias)


def as_conv1d(linear: nn.Linear) -> nn.Module:
    """Return the ``Conv1D`` of transformers that computes the same, with the bias itself of a linear layer."""
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        layer = Conv1D(linear.out_features, linear.in_features)
    layer.weight, layer.bias = nn.Parameter(linear.weight.detach().T.contiguous()), linear.bias
    return layer


def computes_linear(layer: nn.Linear) -> bool:
    """Tell whether an instance of nn.Linear or of a subclass computes ``x @ W.T + bias`` with its own parameters.

    A subclass with a ``forward`` of its own is tried on small random values, in training and in evaluation mode.
    """
    parameters = layer._parameters
    if set(parameters) != {"weight", "bias"} or isinstance(parameters["weight"], nn.UninitializedParameter):
        return False
    if layer._modules:  # parametrizations compute the weight
        return False
    return type(layer).forward is nn.Linear.forward or _agrees(layer)


@torch.no_grad()
def _agrees(layer: nn.Linear) -> bool:
    with unset_fake_temporarily(), torch.device("cpu"):
        numbers = torch.Generator().manual_seed(0)
        weight, bias, x = (torch.randn(shape, generator=numbers) for shape in ((3, 5), (3,), (2, 4, 5)))
        probe = copy.copy(layer)
        probe.__dict__ = {**layer.__dict__, "_parameters": {"weight": nn.Parameter(weight), "bias": None}}
        if layer.bias is not None:
            probe._parameters["bias"] = nn.Parameter(bias)
        probe.in_features, probe.out_features = 5, 3
        expected = F.linear(x, weight, probe.bias)
        try:
            for probe.training in (True, False):
                found = type(layer).forward(probe, x)
                if not torch.allclose(found, expected, rtol=1e-5, atol=1e-5):
                    return False
        except Exception:  # the forward of a class that nobody knows may raise anything
            return False
    return True
