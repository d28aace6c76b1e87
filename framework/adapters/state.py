"""What finetuning has learned, as plain tensors by name, out of a network, into one, and from a file.

An adapter is a dictionary from parameter names to tensors: the generators of every OFT layer, and whatever else is
trained (biases, norms, a head). It does not say how its generators are to be read: block sizes and parameterizations
are those of the network it is loaded into.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from orthotrain.checkpoints.reading import check_finite, compare_state
from orthotrain.errors import ConfigurationError
from orthotrain.files.paths import local_path
from orthotrain.files.torch_files import crc32_of
from orthotrain.layers import OftLayer, mergeable_layers

_MOST_DESCRIPTION = 1 << 24


def oft_layers(network: nn.Module) -> dict[str, OftLayer]:
    """Return the OFT layers by name, shared ones once, in module order.

    Raises:
        ConfigurationError: If there is none, or a layer of another method, whose rotations are no adapter.
    """
    layers: dict[str, OftLayer] = {}
    for name, layer in mergeable_layers(network):
        if not isinstance(layer, OftLayer):
            raise ConfigurationError(
                f"{name} is a {type(layer).__name__}, not an OFT layer: its rotations are merged as training goes on "
                "and leave no adapter; merge it and export the network instead"
            )
        layers[name] = layer
    if not layers:
        raise ConfigurationError("the network has no OFT layer: wrap it with replace_linears and OftLinear.from_linear")
    return layers


def adapter_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that make up an adapter of this network: all generators, and all else that is trained.

    Raises:
        ConfigurationError: As :func:`oft_layers`.
    """
    generators = {id(layer.rotation.generators) for layer in oft_layers(network).values()}
    return {name: p for name, p in network.named_parameters() if p.requires_grad or id(p) in generators}


def adapter_state(network: nn.Module) -> dict[str, Tensor]:
    """Copy the adapter that a network holds now.

    Args:
        network: A network with OFT layers.

    Returns:
        Parameter name -> detached copy, on the device and in the dtype of the parameter.

    Raises:
        ConfigurationError: As :func:`oft_layers`.
    """
    return {name: parameter.detach().clone() for name, parameter in adapter_parameters(network).items()}


def load_adapter(network: nn.Module, path: str | Path) -> None:
    """Copy an adapter file into a network; nothing is written unless all of it fits.

    Args:
        network: A network with OFT layers.
        path: The ``adapter.safetensors`` of an ``AdapterCheckpoint``, or the folder that it lies in.

    Raises:
        ConfigurationError: If the file is missing or damaged, or was written for another base or other layers: their
            names or shapes differ. Which, and in which file, is named.
    """
    path = local_path(path, "adapter")
    path = path / "adapter.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise ConfigurationError(f"adapter {str(path)!r} is not a file: give an adapter.safetensors or its folder")
    _check_sum(path)
    try:
        state = load_file(path)
    except (SafetensorError, OSError, MemoryError, ValueError, OverflowError, RecursionError) as error:
        raise ConfigurationError(f"adapter {str(path)!r} is truncated or no safetensors file: {error}") from error
    try:
        load_adapter_state(network, state)
    except ConfigurationError as error:
        raise ConfigurationError(f"{str(path)!r}: {error}") from error


def _check_sum(path: Path) -> None:
    """Compare a file with the checksum that ``AdapterCheckpoint`` has written beside it; without one it passes.

    Raises:
        ConfigurationError: If they differ, or the description beside it is none.
    """
    description = path.with_name("adapter.json")
    if path.name != "adapter.safetensors" or not description.is_file():
        return
    try:
        if description.stat().st_size > _MOST_DESCRIPTION:
            raise ValueError("it is larger than any description")
        sums = json.loads(description.read_text(encoding="utf-8")).get("crc32", {})
        expected = sums.get(path.name)
    except (ValueError, AttributeError, RecursionError) as error:
        raise ConfigurationError(f"{str(description)!r} is no description of an adapter: {error}") from error
    if expected is not None and expected != crc32_of(path):
        raise ConfigurationError(
            f"adapter {str(path)!r} does not match its checksum in {description.name}: a file was changed or damaged; "
            "take an earlier one"
        )


@torch.no_grad()
def load_adapter_state(network: nn.Module, state: Mapping[str, Tensor], strict: bool = True) -> None:
    """Copy an adapter into a network; nothing is written unless all of it fits.

    Args:
        network: A network with OFT layers.
        state: What :func:`adapter_state` returned for this network or an equal one.
        strict: Whether both must name the same parameters; else those that only one of them names are left alone.

    Raises:
        ConfigurationError: If names or shapes differ, the two have no name in common, or a value is not finite.
    """
    expected = adapter_parameters(network)
    common = [name for name in expected if name in state]
    if not common:
        raise ConfigurationError(
            f"the adapter has none of the network's {len(expected)} trained parameters, such as {next(iter(expected))}"
        )
    if strict:
        difference = compare_state(dict(state), dict(expected))
    else:
        difference = compare_state({name: state[name] for name in common}, {name: expected[name] for name in common})
    if difference:
        raise ConfigurationError(f"the adapter does not fit the network: {difference}")
    check_finite(state, common, "the adapter")
    for name in common:
        expected[name].copy_(state[name])
