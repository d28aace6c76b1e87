"""Replacing the linear layers of a model by wrapped ones, and back."""

import difflib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode

from orthotrain.console.progress import Progress
from orthotrain.errors import ConfigurationError
from orthotrain.layers.mergeable import Mergeable
from orthotrain.layers.weights.bitsandbytes_linear import is_bitsandbytes
from orthotrain.layers.weights.frozen_linear import FrozenLinear, frozen_linears


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
        ConfigurationError: If the model itself is a linear layer, an include pattern matches none, nothing is left, a
            layer is of a class that may compute something else, a weight to replace is tied to another parameter, or
            the module around a layer reads its weight instead of calling it.
    """
    if isinstance(model, nn.Linear):
        raise ConfigurationError(
            "the network is an nn.Linear itself, which nothing around it could replace: put it into nn.Sequential"
        )
    _refuse_conv1d(model, include, exclude)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for pattern in include:
        if not any(fnmatchcase(name, pattern) for name in linears):
            raise ConfigurationError(f"include pattern {pattern!r} matches no linear layer; {_near(pattern, linears)}")
    chosen = {
        name: linear for name, linear in linears.items() if _matches(name, include) and not _matches(name, exclude)
    }
    if not chosen:
        raise ConfigurationError(f"exclude={list(exclude)} leaves no linear layer of include={list(include)}")
    _refuse_subclasses(chosen)
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
            with _naming(name, linear):
                replacements[linear] = factory(linear).train(linear.training)
            bar.advance()
    swap_modules(model, replacements)
    return list(chosen)


def check_wrapping(chosen: Mapping[str, nn.Linear], wrap: Callable[[nn.Linear, str], nn.Module]) -> None:
    """Refuse layers that cannot be wrapped, before anything is changed: each kind is tried on one without storage.

    Args:
        chosen: Name -> layer (:func:`select_linears`).
        wrap: Returns the replacement of a layer, given it and its name; may change the layer.

    Raises:
        ConfigurationError: The first error of ``wrap``, naming the layer and its sizes.
    """
    for name, linear in chosen.items():
        if is_bitsandbytes(linear):
            continue  # without storage it is another kind of layer
        has_bias, dtype = linear.bias is not None, linear.weight.dtype
        with detect_fake_mode() or FakeTensorMode(allow_non_fake_inputs=True), _naming(name, linear):
            wrap(nn.Linear(linear.in_features, linear.out_features, has_bias, device="cpu", dtype=dtype), name)


def release(linear: nn.Linear) -> None:
    """Let go of the memory of a layer's weight: its replacement is made, and the layer is about to leave the network.

    A network of which every layer is replaced would otherwise be held twice until the last one is. Whoever still holds
    the layer and calls it gets an error, and no result without the weight.
    """
    linear.register_parameter("weight", None)


@contextmanager
def _naming(name: str, linear: nn.Linear) -> Iterator[None]:
    try:
        yield
    except ConfigurationError as error:
        raise ConfigurationError(f"layer {name} ({linear.out_features} x {linear.in_features}): {error}") from error


def check_excluded(model: nn.Module, exclude: Sequence[str], defaults: Sequence[str]) -> None:
    """Refuse a pattern that excludes nothing: it is misspelt, and what it was to spare would be replaced.

    Args:
        model: Any module.
        exclude: See :func:`select_linears`.
        defaults: Patterns that may match nothing, since no user has written them.

    Raises:
        ConfigurationError: Naming the pattern and modules with names like it.
    """
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    for pattern in exclude:
        if pattern not in defaults and not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigurationError(
                f"exclude pattern {pattern!r} matches no module: the model has, for example, {_alike(pattern, names)}"
            )


def squeezed(name: str) -> str:
    """Return the letters and digits of a name or a pattern, by which misspellings are found."""
    return "".join(filter(str.isalnum, name)).lower()


def unwrap_mergeables(model: nn.Module) -> list[str]:
    """Replace every :class:`Mergeable` in place by its plain merged layer; return their names.

    Quantised layers that were left unwrapped, ours or those of bitsandbytes, become plain linears as well.

    Raises:
        ConfigurationError: If a layer of bitsandbytes has a format that cannot be unpacked, naming it.
    """
    quantised = frozen_linears(model)
    quantised |= {layer: layer for layer in model.modules() if isinstance(layer, FrozenLinear)}
    wrapped = {name: module for name, module in model.named_modules() if isinstance(module, Mergeable)}
    replacements: dict[nn.Module, nn.Module] = {}
    with Progress("merging", len(wrapped), "layers", announce=False) as bar:
        for name, layer in wrapped.items():
            replacements[model.get_submodule(name)] = layer.unwrap()
            bar.advance()
    swap_modules(model, replacements | {module: frozen.unwrap() for module, frozen in quantised.items()})
    return list(wrapped)


def swap_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put every replacement in the place, or the places, of what it replaces below ``model``."""
    for parent in list(model.modules()):
        # _modules, since named_children lists a module that one parent holds twice only once
        for child_name, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                setattr(parent, child_name, replacements[child])


def _refuse_conv1d(model: nn.Module, include: Sequence[str], exclude: Sequence[str]) -> None:
    """Refuse to leave out silently the layers of GPT-2 and its kin, linear as they are."""
    modules: Any = sys.modules.get("transformers.pytorch_utils")
    for name, module in model.named_modules() if modules is not None else ():
        if isinstance(module, modules.Conv1D) and _matches(name, include) and not _matches(name, exclude):
            raise ConfigurationError(
                f"{name} is a Conv1D of transformers (as in GPT-2), not an nn.Linear: its weight is stored transposed, "
                "which is not supported; take a model made of nn.Linear, or exclude such layers, for example "
                f"'*{name.rpartition('.')[2]}'"
            )


def _refuse_subclasses(chosen: dict[str, nn.Linear]) -> None:
    # the last is the first's class in nn.MultiheadAttention, with the same forward
    plain = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
    for name, linear in chosen.items():
        if type(linear) not in plain and not is_bitsandbytes(linear):
            raise ConfigurationError(
                f"{name} is a {type(linear).__name__}, a subclass of nn.Linear that may compute something else than "
                f"x @ W.T + bias: make it an nn.Linear, or add {name!r} to exclude"
            )


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


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
    return f"the model has {len(linears)}, for example {_alike(pattern, list(linears))}"


def _alike(pattern: str, names: list[str]) -> str:
    alike = [name for name in names if squeezed(pattern) and squeezed(pattern) in squeezed(name)]
    return ", ".join(alike[:3] or difflib.get_close_matches(pattern.strip("*"), names, n=3, cutoff=0.3) or names[:3])
