"""Copies the tensors of an adapter out of a network, into a network, and from a file."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from orthotrain.checkpoints.reading import check_finite, compare_state
from orthotrain.errors import ConfigurationError
from orthotrain.files.paths import local_path, read_json
from orthotrain.files.torch_files import crc32_of
from orthotrain.layers import OftLayer, mergeable_layers
from orthotrain.layers.linear_kinds import as_conv1d
from orthotrain.layers.replacement import swap_modules
from orthotrain.layers.selection import matching


def oft_layers(network: nn.Module) -> dict[str, OftLayer]:
    """Return the OFT layers by name in module order. A layer with several names is returned once.

    Raises:
        ConfigurationError: There is no OFT layer, or there is a layer of another method.
    """
    layers: dict[str, OftLayer] = {}
    for name, layer in mergeable_layers(network):
        if not isinstance(layer, OftLayer):
            raise ConfigurationError(
                f"{name} is a {type(layer).__name__}, not an OFT layer: its rotations are merged during training, so "
                "that there is no adapter; merge it and export the network instead"
            )
        layers[name] = layer
    if not layers:
        raise ConfigurationError("the network has no OFT layer: wrap it with replace_linears and OftLinear.from_linear")
    return layers


def adapter_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of an adapter by name: all generators, and all other trained parameters.

    Raises:
        ConfigurationError: As :func:`oft_layers`.
    """
    generators = {id(layer.rotation.generators) for layer in oft_layers(network).values()}
    return {name: p for name, p in network.named_parameters() if p.requires_grad or id(p) in generators}


def generator_names(layers: Mapping[str, OftLayer]) -> dict[str, str]:
    """Return layer name -> name of its generators among the parameters of the network."""
    return {name: f"{name}.rotation_{layer.side}.generators".removeprefix(".") for name, layer in layers.items()}


def chosen_layers(names: Collection[str], patterns: Sequence[str] | None) -> set[str]:
    """Return the names of layers that patterns choose; all of them for None.

    Raises:
        ConfigurationError: A pattern matches no layer.
    """
    if patterns is None:
        return set(names)
    chosen: set[str] = set()
    for pattern in patterns:
        found = matching(names, pattern)
        if not found:
            raise ConfigurationError(f"layers: {pattern!r} matches no OFT layer; there are {', '.join(names)}")
        chosen |= found
    return chosen


def check_generators_alone(network: nn.Module) -> None:
    """Refuse a network in which other parameters than generators are trained, such as biases, norms or a head.

    Raises:
        ConfigurationError: As :func:`oft_layers`; or naming such a parameter.
    """
    generators = {id(layer.rotation.generators) for layer in oft_layers(network).values()}
    others = [name for name, p in adapter_parameters(network).items() if id(p) not in generators]
    if others:
        raise ConfigurationError(
            f"{others[0]} is trained besides the generators ({len(others)} parameters): without the rotations the "
            "network is not the base network; reload the base network instead"
        )


def unload(network: nn.Module) -> nn.Module:
    """Take the OFT layers out of a network, in place and without merging.

    Each layer becomes the plain layer that it wraps, with the frozen weight itself: that of the base bit for bit, if
    no adapter was merged. Weights stay frozen. A quantized weight stays packed, in a :class:`FrozenLinear`.
    Buffers, such as running statistics, stay as they are.

    Args:
        network: A network with OFT layers. Its generators are lost; :func:`adapter_state` copies them.

    Returns:
        The network.

    Raises:
        ConfigurationError: As :func:`oft_layers`; the network itself is an OFT layer; or other parameters than
            generators are trained, so that the plain network would not be the base.
    """
    layers = oft_layers(network)
    if "" in layers:
        raise ConfigurationError("the network is an OFT layer itself: take what its unload() returns")
    check_generators_alone(network)
    plain: dict[nn.Module, nn.Module] = {}
    for layer in layers.values():
        unloaded: Any = layer.unload()
        if getattr(layer, "is_conv1d", False) and isinstance(unloaded, nn.Linear):
            unloaded = as_conv1d(unloaded)
            unloaded.weight.requires_grad_(False)
        plain[layer] = unloaded
    swap_modules(network, plain)
    return network


def adapter_state(network: nn.Module) -> dict[str, Tensor]:
    """Copy the adapter of a network.

    Args:
        network: A network with OFT layers.

    Returns:
        Parameter name -> detached copy, on the device and in the dtype of the parameter.

    Raises:
        ConfigurationError: As :func:`oft_layers`.
    """
    return {name: parameter.detach().clone() for name, parameter in adapter_parameters(network).items()}


def load_adapter(network: nn.Module, path: str | Path) -> None:
    """Copy an adapter file into a network. The network is changed only if the whole adapter fits.

    Args:
        network: A network with OFT layers.
        path: The ``adapter.safetensors`` of an ``AdapterCheckpoint``, or its folder.

    Raises:
        ConfigurationError: The file is missing or damaged, or its names or shapes differ from those of the network; the
            message gives the file and the difference.
    """
    path = local_path(path, "adapter")
    path = path / "adapter.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise ConfigurationError(f"adapter {str(path)!r} is not a file: give an adapter.safetensors or its folder")
    _check_sum(path)
    state, _ = read_safetensors(path)
    try:
        load_adapter_state(network, state)
    except ConfigurationError as error:
        raise ConfigurationError(f"{str(path)!r}: {error}") from error


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file on the CPU by their names, and the metadata of the file.

    Raises:
        ConfigurationError: The file is truncated or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:  # a damaged file can raise any exception
        raise ConfigurationError(f"adapter {str(path)!r} is truncated or is not a safetensors file: {error}") from error


def _check_sum(path: Path) -> None:
    """Compare a file with its checksum in the ``adapter.json`` of its folder. Without a checksum the file passes.

    Raises:
        ConfigurationError: The checksums differ, or ``adapter.json`` is damaged.
    """
    description = path.with_name("adapter.json")
    if path.name != "adapter.safetensors" or not description.is_file():
        return
    contents = read_json(description, "description of an adapter")
    try:
        expected = contents.get("crc32", {}).get(path.name)
    except AttributeError as error:
        raise ConfigurationError(f"{str(description)!r} is not a description of an adapter: {error}") from error
    if expected is not None and expected != crc32_of(path):
        raise ConfigurationError(
            f"adapter {str(path)!r} does not match its checksum in {description.name}: a file was changed or damaged; "
            "take an earlier adapter"
        )


@torch.no_grad()
def load_adapter_state(network: nn.Module, state: Mapping[str, Tensor], strict: bool = True) -> None:
    """Copy an adapter into a network. The network is changed only if the whole adapter fits.

    Args:
        network: A network with OFT layers.
        state: Result of :func:`adapter_state` for this network or an equal one.
        strict: Whether the adapter and the network must have the same names. Otherwise, names that only one of them has
            are ignored.

    Raises:
        ConfigurationError: Names or shapes differ, there is no common name, or a value is not finite.
    """
    expected = adapter_parameters(network)
    common = [name for name in expected if name in state]
    if not common:
        raise ConfigurationError(
            f"the adapter has none of the network's {len(expected)} trained parameters, such as {next(iter(expected))}"
        )
    if not strict:
        state, expected = {name: state[name] for name in common}, {name: expected[name] for name in common}
    if difference := compare_state(state, expected):
        raise ConfigurationError(f"the adapter does not fit the network: {difference}")
    check_finite(state, common, "the adapter")
    for name in common:
        expected[name].copy_(state[name])
