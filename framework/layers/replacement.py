"""Replacing layers of a network by wrapped ones, and mergeable layers by plain ones again."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode

from orthotrain.console.progress import Progress
from orthotrain.errors import ConfigurationError
from orthotrain.layers.linear_kinds import as_conv1d, as_linear, is_conv1d, linear_sizes
from orthotrain.layers.protocols import Mergeable
from orthotrain.layers.selection import select_linears
from orthotrain.layers.weights.bitsandbytes_linear import is_bitsandbytes
from orthotrain.layers.weights.frozen_linear import FrozenLinear, frozen_linears

Layer = TypeVar("Layer", bound=nn.Module)


def replace_linears(
    model: nn.Module,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    factory: Callable[[nn.Linear], nn.Module] | None = None,
) -> list[str]:
    """Replace the chosen linear layers in place by ``factory(linear)``.

    All replacements are made before the first one is put in place, so an error leaves the model as it was. A module
    that has several names is replaced once and stays shared.

    Args:
        model: Any module that is not itself a linear layer.
        include: See :func:`select_linears`.
        exclude: See :func:`select_linears`.
        factory: Builds the replacement, for example ``PoetLinear.from_linear``.

    Returns:
        The names of the replaced layers.

    Raises:
        ConfigurationError: As :func:`select_linears`; or if the factory refuses a layer, naming the layer and its
            sizes.

    Example:
        >>> from orthotrain.layers import PoetLinear
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> replace_linears(model, exclude=["2"], factory=lambda linear: PoetLinear.from_linear(linear, block_size=8))
        ['0']
    """
    if factory is None:
        raise ConfigurationError("replace_linears needs a factory, for example PoetLinear.from_linear")
    chosen = select_linears(model, include, exclude)
    replace_layers(model, chosen, lambda linear, _: factory(linear))
    return list(chosen)


def replace_layers(model: nn.Module, chosen: Mapping[str, Layer], factory: Callable[[Layer, str], nn.Module]) -> None:
    """Replace layers in place by ``factory(layer, name)``; see :func:`replace_linears`.

    Args:
        model: The network.
        chosen: Name -> layer (:func:`select_layers`).
        factory: Builds the replacement.

    Raises:
        ConfigurationError: If the factory refuses a layer, naming the layer and its sizes.
    """
    replacements: dict[nn.Module, nn.Module] = {}
    with Progress("wrapping", len(chosen), "layers", announce=False) as bar:
        for name, layer in chosen.items():
            with _naming(name, layer):
                replacement = factory(as_linear(layer), name).train(layer.training)
                if is_conv1d(layer):
                    replacement.is_conv1d = True  # type: ignore[assignment]
                replacements[layer] = replacement
            bar.advance()
    swap_modules(model, replacements)


def check_wrapping(
    chosen: Mapping[str, Layer], wrap: Callable[[Layer, str], nn.Module], settings: Callable[[str], object]
) -> None:
    """Refuse layers that cannot be wrapped, before anything is changed: ``wrap`` is tried on copies without storage.

    Args:
        chosen: Name -> layer (:func:`select_layers`).
        wrap: Returns the replacement of a layer, given the layer and its name; may change the layer.
        settings: Name -> the settings that ``wrap`` uses. Of layers with equal sizes and settings, one is tried.

    Raises:
        ConfigurationError: The first error of ``wrap``, naming the layer and its sizes.
    """
    tried: list[object] = []
    for name, linear in chosen.items():
        # without storage a layer of bitsandbytes would be another kind of layer
        sizes = linear_sizes(linear)
        if sizes is None or is_bitsandbytes(linear):
            continue
        has_bias, dtype = linear.bias is not None, linear.weight.dtype
        if (kind := (sizes, has_bias, dtype, settings(name))) in tried:
            continue
        tried.append(kind)
        with detect_fake_mode() or FakeTensorMode(allow_non_fake_inputs=True), _naming(name, linear):
            copy: Any = nn.Linear(sizes[1], sizes[0], has_bias, device="cpu", dtype=dtype)
            wrap(copy, name)


def release(linear: nn.Module) -> None:
    """Free the memory of a layer's weight, after the layer's replacement has been made.

    Otherwise both the old and the new weights of all layers would be in memory until the last layer is replaced. A call
    of the old layer is an error from then on.
    """
    linear.register_parameter("weight", None)


def unwrap_mergeables(model: nn.Module) -> list[str]:
    """Replace every :class:`Mergeable` in place by its plain merged layer; return their names.

    Quantized layers that were never wrapped, of this package or of bitsandbytes, become plain linear layers too.

    Raises:
        ConfigurationError: If a layer of bitsandbytes has a format that cannot be unpacked, naming the layer.
    """
    quantized = frozen_linears(model)
    quantized |= {layer: layer for layer in model.modules() if isinstance(layer, FrozenLinear)}
    wrapped = {name: module for name, module in model.named_modules() if isinstance(module, Mergeable)}
    replacements: dict[nn.Module, nn.Module] = {}
    with Progress("merging", len(wrapped), "layers", announce=False) as bar:
        for name, layer in wrapped.items():
            plain: Any = layer.unwrap()
            module = model.get_submodule(name)
            replacements[module] = as_conv1d(plain) if getattr(module, "is_conv1d", False) else plain
            bar.advance()
    swap_modules(model, replacements | {module: frozen.unwrap() for module, frozen in quantized.items()})
    return list(wrapped)


def swap_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put every replacement wherever the replaced module is found below ``model``."""
    for parent in list(model.modules()):
        # _modules, because named_children yields a module that one parent holds twice only once
        for child_name, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                setattr(parent, child_name, replacements[child])


@contextmanager
def _naming(name: str, layer: nn.Module) -> Iterator[None]:
    try:
        yield
    except ConfigurationError as error:
        sizes = linear_sizes(layer)
        described = "" if sizes is None else f" ({sizes[0]} x {sizes[1]})"
        raise ConfigurationError(f"layer {name}{described}: {error}") from error
