"""Replacing the linear layers of a model by wrapped ones, and back."""

import difflib
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from orthotrain.errors import ConfigurationError
from orthotrain.layers.mergeable import Mergeable
from orthotrain.progress import Progress


def select_linears(
    model: nn.Module, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()
) -> dict[str, nn.Linear]:
    """Find the linear layers that a replacement would touch.

    Args:
        model: Any module.
        include: Glob patterns on full module names (``*.mlp.*``, ``model.layers.?.self_attn.q_proj``).
        exclude: Glob patterns taken out again; these may match nothing.

    Returns:
        Name -> layer in module order; a module that is used under several names appears under the first.

    Raises:
        ConfigurationError: If an include pattern matches no linear layer, nothing is left, a weight to replace is tied
            to another parameter, or the module around a layer reads its weight instead of calling it.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for pattern in include:
        if not any(fnmatchcase(name, pattern) for name in linears):
            raise ConfigurationError(f"include pattern {pattern!r} matches no linear layer; {_near(pattern, linears)}")
    chosen = {
        name: linear
        for name, linear in linears.items()
        if any(fnmatchcase(name, p) for p in include) and not any(fnmatchcase(name, p) for p in exclude)
    }
    if not chosen:
        raise ConfigurationError(f"exclude={list(exclude)} leaves no linear layer of include={list(include)}")
    _refuse_tied(model, chosen)
    _refuse_uncalled(model, chosen)
    return chosen


def replace_linears(
    model: nn.Module,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    factory: Callable[[nn.Linear], nn.Module] | None = None,
) -> list[str]:
    """Replace the selected linear layers in place by ``factory(linear)``.

    All replacements are made before the first is put in, so an error leaves the model as it was. A module that several
    names share is replaced once and stays shared.

    Args:
        model: Any module that is not itself a linear layer.
        include: See :func:`select_linears`.
        exclude: See :func:`select_linears`.
        factory: Builds the replacement, for example ``PoetLinear.from_linear``.

    Returns:
        The names of the replaced layers.

    Raises:
        ConfigurationError: As :func:`select_linears`; or if the factory refuses a layer, naming it and its sizes.
    """
    if factory is None:
        raise ConfigurationError("replace_linears needs a factory, for example PoetLinear.from_linear")
    replacements: dict[nn.Module, nn.Module] = {}
    chosen = select_linears(model, include, exclude)
    with Progress("wrapping", len(chosen), "layers", announce=False) as bar:
        for name, linear in chosen.items():
            try:
                replacements[linear] = factory(linear).train(linear.training)
            except ConfigurationError as error:
                shape = f"{linear.out_features} x {linear.in_features}"
                raise ConfigurationError(f"layer {name} ({shape}): {error}") from error
            bar.advance()
    _swap(model, replacements)
    return list(chosen)


def unwrap_mergeables(model: nn.Module) -> list[str]:
    """Replace every :class:`Mergeable` in place by its plain merged layer; return their names."""
    wrapped = {name: module for name, module in model.named_modules() if isinstance(module, Mergeable)}
    replacements: dict[nn.Module, nn.Module] = {}
    with Progress("merging", len(wrapped), "layers", announce=False) as bar:
        for name, layer in wrapped.items():
            replacements[model.get_submodule(name)] = layer.unwrap()
            bar.advance()
    _swap(model, replacements)
    return list(wrapped)


def _swap(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    for parent in list(model.modules()):
        # _modules, since named_children lists a module that one parent holds twice only once
        for child_name, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                setattr(parent, child_name, replacements[child])


def _refuse_tied(model: nn.Module, chosen: dict[str, nn.Linear]) -> None:
    owners: dict[int, list[str]] = {}
    for module_name, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(f"{module_name}.{parameter_name}")
    for name, linear in chosen.items():
        others = [owner for owner in owners[id(linear.weight)] if owner != f"{name}.weight"]
        if others:
            raise ConfigurationError(
                f"{name}.weight is tied to {', '.join(others)}: a frozen, rotated copy would untie them; "
                f"add {name!r} to exclude"
            )


def _refuse_uncalled(model: nn.Module, chosen: dict[str, nn.Linear]) -> None:
    names = {linear: name for name, linear in chosen.items()}
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


def _near(pattern: str, linears: dict[str, nn.Linear]) -> str:
    if not linears:
        return "the model has none at all"
    near = difflib.get_close_matches(pattern, linears, n=3, cutoff=0.3) or list(linears)[:3]
    return f"the model has {len(linears)}, for example {', '.join(near)}"
