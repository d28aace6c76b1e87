"""Choosing layers of a network by patterns on their names, and refusing layers that a replacement would break."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import cast

import torch
from torch import nn

from orthotrain.errors import ConfigurationError
from orthotrain.layers.linear_kinds import check_wrappable, linear_sizes

ALL_LINEAR = "all-linear"
"""The pattern of all linear layers but the output head, as in PEFT."""


def select_linears(
    model: nn.Module, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()
) -> dict[str, nn.Linear]:
    """Choose the linear layers that patterns match.

    Args:
        model: Any module.
        include: Patterns: globs on full module names (``*.mlp.*``, ``model.layers.?.self_attn.q_proj``); plain names,
            which mean the full name or, if no layer has it, the last parts of names (``q_proj``); or ``all-linear``.
        exclude: Patterns of layers that are left out; these may match nothing.

    Returns:
        Name -> layer in module order. A module that has several names appears under the first.

    Raises:
        ConfigurationError: If the model itself is a linear layer, an include pattern matches none, nothing is left, a
            layer has a hook or is of a class that may compute something else, a weight to replace is tied to another
            parameter, or the module around a layer reads its weight instead of calling it.
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
    modules = dict(model.named_modules())
    linears = {name: module for name, module in modules.items() if linear_sizes(module) is not None}
    rest = {name: module for name, module in modules.items() if type(module) in others}
    matched: set[str] = set()
    for pattern in include:
        names = _linears_of(model, linears) if pattern == ALL_LINEAR else matching(linears, pattern)
        names = names or matching(rest, pattern)
        if not names:
            raise ConfigurationError(
                f"include pattern {pattern!r} matches no linear layer; {_near(pattern, linears or rest)}"
            )
        matched |= names
    left_out = {name for pattern in exclude for name in matching({**linears, **rest}, pattern)}
    chosen = {name: module for name, module in modules.items() if name in matched - left_out}
    if not chosen:
        convolutions = [name for name, module in modules.items() if type(module) is nn.Conv2d]
        hint = (
            f"; OFT also rotates convolutions that include names, such as {convolutions[-1]!r}" if convolutions else ""
        )
        raise ConfigurationError(f"exclude={list(exclude)} leaves no linear layer of include={list(include)}{hint}")
    for name, layer in chosen.items():
        check_wrappable(layer, name)
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
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    names, leaves = list(modules), [name for name, module in modules.items() if not module._modules]
    for pattern in exclude:
        found = any(fnmatchcase(name, pattern) for name in names) or matching(leaves, pattern)
        if pattern not in defaults and not found:
            raise ConfigurationError(
                f"exclude pattern {pattern!r} matches no module: the model has, for example, {_alike(pattern, names)}"
            )


def squeezed(name: str) -> str:
    """Return the letters and digits of a name or a pattern, to compare misspelt names by."""
    return "".join(filter(str.isalnum, name)).lower()


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


def matching(names: Iterable[str], pattern: str) -> set[str]:
    """Return the names that a pattern chooses: a glob on whole names, or a plain name.

    A plain name means itself or, if it is none of the names, the last parts of names, as in PEFT.
    """
    names = list(names)
    found = {name for name in names if fnmatchcase(name, pattern)}
    return found or {name for name in names if ends_with(name, pattern)}


def ends_with(name: str, pattern: str) -> bool:
    """Tell whether a plain name, without the characters of a glob, is the last part, or the last parts, of a name."""
    return not set("*?[") & set(pattern) and name.endswith(f".{pattern}")


def _linears_of(model: nn.Module, linears: Mapping[str, nn.Module]) -> set[str]:
    """Return the names of all linear layers but the output head."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {name for name, module in linears.items() if module is not head}


def _near(pattern: str, linears: Mapping[str, nn.Module]) -> str:
    if not linears:
        return "the model has no linear layer"
    return f"the model has {len(linears)}, for example {_alike(pattern, list(linears))}"


def _alike(pattern: str, names: list[str]) -> str:
    alike = [name for name in names if squeezed(pattern) and squeezed(pattern) in squeezed(name)]
    return ", ".join(alike[:3] or difflib.get_close_matches(pattern.strip("*"), names, n=3, cutoff=0.3) or names[:3])
