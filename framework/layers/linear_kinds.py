"""Which layers can be wrapped: without hooks, and with the function of a plain layer, such as Conv1D (GPT-2)."""

import copy
import sys
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn import functional as F
from torch.nn.modules.lazy import LazyModuleMixin

from orthotrain.errors import ConfigurationError
from orthotrain.layers.weights.bitsandbytes_linear import is_bitsandbytes
from orthotrain.layers.weights.frozen_weight import plain_linear

_HOOKS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_backward_hooks": "backward hook",
}


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


def check_wrappable(layer: nn.Module, name: str = "") -> None:
    """Refuse a layer that a wrapped layer could not stand for, because it has hooks or computes something else.

    Args:
        layer: A linear layer, convolution or embedding.
        name: Its name in the network, for the message.

    Raises:
        ConfigurationError: Naming the hook, or the class and what it should compute.
    """
    who, kind = name or "the layer", type(layer).__name__
    otherwise = f"add {name!r} to exclude" if name else "leave the layer out (exclude)"
    if isinstance(layer, LazyModuleMixin):
        raise ConfigurationError(f"{who} is a {kind} without a weight yet: call the network once, or {otherwise}")
    hook = _hook(layer)
    if hook is not None:
        raise ConfigurationError(f"{who} has {hook}, which a wrapped layer would not run: remove it, or {otherwise}")
    if isinstance(layer, nn.Linear) and not is_bitsandbytes(layer) and not computes_linear(layer):
        raise ConfigurationError(
            f"{who} is a {kind}, a subclass of nn.Linear that may compute something else than x @ W.T + bias: "
            f"make it an nn.Linear, or {otherwise}"
        )
    if isinstance(layer, nn.Conv2d) and not _convolves(layer):
        raise ConfigurationError(
            f"{who} is a {kind}, a subclass of nn.Conv2d that may compute something else: make it an nn.Conv2d, or "
            f"{otherwise}"
        )
    if isinstance(layer, nn.Embedding) and not _scales_rows(layer):
        raise ConfigurationError(
            f"{who} is a {kind}, a subclass of nn.Embedding that may compute something else than rows times a factor: "
            f"make it an nn.Embedding, or {otherwise}"
        )


def computes_linear(layer: nn.Linear) -> bool:
    """Tell whether an instance of nn.Linear or of a subclass computes ``x @ W.T + bias`` with its own parameters.

    A subclass with a ``forward`` of its own is tried on random values, in training and in evaluation mode.
    """
    parameters = layer._parameters
    if set(parameters) != {"weight", "bias"} or layer._modules:  # parametrizations compute the weight
        return False
    if type(layer).forward is nn.Linear.forward:
        return True
    rows, columns = layer.out_features, layer.in_features
    # each width itself, and both at once up to a size that costs nothing in a network of billions of parameters
    shapes = {(3, columns), (rows, 3), (min(rows, 128), min(columns, 128))}
    return all(_tried(layer, partial(_is_linear, rows=rows, columns=columns)) for rows, columns in sorted(shapes))


def _hook(layer: nn.Module) -> str | None:
    """Describe a hook of a layer, or a forward of the instance; None if it has neither."""
    for attribute, kind in _HOOKS.items():
        for hook in getattr(layer, attribute, {}).values():
            function = hook.func if isinstance(hook, partial) else hook
            # those of Lightning, such as its profiler's, only observe
            if not str(getattr(function, "__module__", "")).startswith("lightning."):
                return f"the {kind} {getattr(hook, '__name__', type(hook).__name__)}"
    mover: Any = layer.__dict__.get("_hf_hook")
    # accelerate only moves inputs to the device of the layer; every layer has this hook after load_in_4bit
    moves = type(mover).__name__ == "AlignDevicesHook" and not mover.offload
    forward = layer.__dict__.get("_old_forward" if moves else "forward")
    # a patch that was undone leaves the method of the class on the instance
    undone = forward == MethodType(type(layer).forward, layer)
    return None if forward is None or undone else "a forward of its own, set on the instance"


def _is_linear(probe: Any, rows: int, columns: int) -> bool:
    numbers = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(shape, generator=numbers) for shape in ((rows, columns), (rows,), (2, 4, columns)))
    has_bias = probe.bias is not None
    probe._parameters = {"weight": nn.Parameter(weight), "bias": nn.Parameter(bias) if has_bias else None}
    probe.out_features, probe.in_features = rows, columns
    # large values too, which a clamp changes
    return all(_close(type(probe).forward(probe, v), F.linear(v, weight, probe.bias)) for v in (x, 1000 * x))


def _convolves(layer: nn.Conv2d) -> bool:
    kind = type(layer)
    methods = kind.forward is nn.Conv2d.forward and kind._conv_forward is nn.Conv2d._conv_forward
    return methods and set(layer._parameters) == {"weight", "bias"} and not layer._modules


def _scales_rows(layer: nn.Embedding) -> bool:
    """Tell whether an embedding returns its rows times one factor, which commutes with a rotation."""
    if set(layer._parameters) != {"weight"} or layer._modules:
        return False
    return type(layer).forward is nn.Embedding.forward or _tried(layer, _is_scaled)


def _is_scaled(probe: Any) -> bool:
    size = (min(probe.num_embeddings, 16), probe.embedding_dim)
    weight, index = torch.randn(size, generator=torch.Generator().manual_seed(0)), torch.arange(size[0])
    probe._parameters, probe.num_embeddings = {"weight": nn.Parameter(weight)}, size[0]
    # tables of two sizes, with one factor for both
    found = type(probe).forward(probe, index)
    factor = found[0, 0] / weight[0, 0]
    probe._parameters = {"weight": nn.Parameter(1000 * weight)}
    return _close(found, factor * weight) and _close(type(probe).forward(probe, index), 1000 * factor * weight)


def _close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, rtol=1e-5, atol=1e-5 * max(1.0, expected.abs().max().item()))


@torch.no_grad()
def _tried(layer: nn.Module, agrees: Callable[[nn.Module], bool]) -> bool:
    """Tell whether a copy of a layer, without its own values, passes a check in training and in evaluation mode."""
    with unset_fake_temporarily(), torch.device("cpu"):
        probe = copy.copy(layer)
        probe.__dict__ = dict(layer.__dict__)
        try:
            for probe.training in (True, False):
                if not agrees(probe):
                    return False
        except Exception:  # the forward of a class that nobody knows may raise anything
            return False
    return True
