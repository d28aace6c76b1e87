"""Choosing layers of a network by patterns on their names, and refusing layers that a replacement would break."""

import difflib
import sys
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import nn

from orthotrain.errors import ConfigurationError
from orthotrain.layers.weights.bitsandbytes_linear import is_bitsandbytes

# nn.MultiheadAttention has the second class, with the same forward
PLAIN_LINEARS = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)


def select_linears(
    model: nn.Module, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()
) -> dict[str, nn.Linear]:
    """Choose the linear layers that patterns match.

    Args:
        model: Any module.
        include: Glob patterns on full module names (``*.mlp.*``, ``model.layers.?.self_attn.q_proj``).
        exclude: Glob patterns of layers that are left out; these may match nothing.

    Returns:
        Name -> layer in module order. A module that has several names appears under the first.

    Raises:
        ConfigurationError: If the model itself is a linear layer, an include pattern matches none, nothing is left, a
            layer is of a class that may compute something else, a weight to replace is tied to another parameter, or
            the module around a layer reads its weight instead of calling it.
    """
    return cast(dict[str, nn.Linear], select_layers(model, include, exclude))


def select_layers(
    model: nn.Module,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    others: tuple[type[nn.Module], ...] = (),
) -> dict[str, nn.Module]:
    """Choose layers: the linear layers that a pattern matches, or layers of other classes if it matches no linear one.

    Args:
        model: See :func:`select_linears`.
        include: See :func:`select_linears`.
        exclude: See :func:`select_linears`.
        others: The other classes, such as ``nn.Conv2d``.

    Returns:
        Name -> layer, as :func:`select_linears` does.

    Raises:
        ConfigurationError: As :func:`select_linears`.
    """
    if isinstance(model, nn.Linear):
        raise ConfigurationError(
            "the network is an nn.Linear itself, which cannot be replaced in a parent: put it into nn.Sequential"
        )
    _refuse_conv1d(model, include, exclude)
    modules = dict(model.named_modules())
    linears = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
    rest = {name: module for name, module in modules.items() if type(module) in others}
    matched: set[str] = set()
    for pattern in include:
        names = _matching(linears, pattern) or _matching(rest, pattern)
        if not names:
            raise ConfigurationError(f"include pattern {pattern!r} matches no linear layer; {_near(pattern, linears)}")
        matched |= names
    chosen = {name: module for name, module in modules.items() if name in matched and not _matches(name, exclude)}
    if not chosen:
        convolutions = [name for name, module in modules.items() if type(module) is nn.Conv2d]
        hint = (
            f"; OFT also rotates convolutions that include names, such as {convolutions[-1]!r}" if convolutions else ""
        )
        raise ConfigurationError(f"exclude={list(exclude)} leaves no linear layer of include={list(include)}{hint}")
    _refuse_subclasses(chosen)
    _refuse_tied(model, chosen)
    _refuse_uncalled(model, chosen)
    return chosen


def check_excluded(model: nn.Module, exclude: Sequence[str], defaults: Sequence[str]) -> None:
    """Refuse a pattern that excludes nothing: it is misspelt, and the layer that it means would be replaced.

    Args:
        model: Any module.
        exclude: See :func:`select_linears`.
        defaults: Patterns that may match nothing, because they are defaults and not the user's.

    Raises:
        ConfigurationError: Naming the pattern and modules with similar names.
    """
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    for pattern in exclude:
        if pattern not in defaults and not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigurationError(
                f"exclude pattern {pattern!r} matches no module: the model has, for example, {_alike(pattern, names)}"
            )


def squeezed(name: str) -> str:
    """Return the letters and digits of a name or a pattern, to compare misspelt names by."""
    return "".join(filter(str.isalnum, name)).lower()


def _refuse_conv1d(model: nn.Module, include: Sequence[str], exclude: Sequence[str]) -> None:
    """Refuse the linear layers of GPT-2 and similar models, which would be left out silently."""
    modules: Any = sys.modules.get("transformers.pytorch_utils")
    for name, module in model.named_modules() if modules is not None else ():
        if isinstance(module, modules.Conv1D) and _matches(name, include) and not _matches(name, exclude):
            raise ConfigurationError(
                f"{name} is a Conv1D of transformers (as in GPT-2), not an nn.Linear: its weight is stored transposed, "
                "which is not supported; take a model made of nn.Linear, or exclude such layers, for example "
                f"'*{name.rpartition('.')[2]}'"
            )


def _refuse_subclasses(chosen: Mapping[str, nn.Module]) -> None:
    for name, linear in chosen.items():
        if isinstance(linear, nn.Linear) and type(linear) not in PLAIN_LINEARS and not is_bitsandbytes(linear):
            raise ConfigurationError(
                f"{name} is a {type(linear).__name__}, a subclass of nn.Linear that may compute something else than "
                f"x @ W.T + bias: make it an nn.Linear, or add {name!r} to exclude"
            )


def _refuse_tied(model: nn.Module, chosen: Mapping[str, nn.Module]) -> None:
    owners: dict[int, list[str]] = {}
    for module_name, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(f"{module_name}.{parameter_name}")
    for name, layer in chosen.items():
        others = [owner for owner in owners[id(layer.weight)] if owner != f"{name}.weight"]
        if others:
            raise ConfigurationError(
                f"{name}.weight is tied to {', '.join(others)}: a frozen, rotated copy would untie them; "
                f"add {name!r} to exclude"
            )


def _refuse_uncalled(model: nn.Module, chosen: Mapping[str, nn.Module]) -> None:
    """Refuse layers whose weight PyTorch's attention and encoder read without calling the layer."""
    names = {layer: name for name, layer in chosen.items()}
    for parent in model.modules():
        if isinstance(parent, nn.MultiheadAttention) and parent.out_proj in names:
            raise ConfigurationError(
                f"{names[parent.out_proj]} is never called: nn.MultiheadAttention reads its weight; "
                f"add {names[parent.out_proj]!r} or '*out_proj' to exclude"
            )
    for parent in model.modules():
        if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
            for linear in (parent.linear1, parent.linear2):
                if linear in names:
                    raise ConfigurationError(
                        f"{names[linear]} is not called in evaluation: nn.TransformerEncoderLayer reads its weight; "
                        f"call torch.backends.mha.set_fastpath_enabled(False), or add {names[linear]!r} to exclude"
                    )


def _matching(layers: Mapping[str, nn.Module], pattern: str) -> set[str]:
    return {name for name in layers if fnmatchcase(name, pattern)}


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _near(pattern: str, linears: Mapping[str, nn.Module]) -> str:
    if not linears:
        return "the model has no linear layer"
    return f"the model has {len(linears)}, for example {_alike(pattern, list(linears))}"


def _alike(pattern: str, names: list[str]) -> str:
    alike = [name for name in names if squeezed(pattern) and squeezed(pattern) in squeezed(name)]
    return ", ".join(alike[:3] or difflib.get_close_matches(pattern.strip("*"), names, n=3, cutoff=0.3) or names[:3])
