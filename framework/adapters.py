"""Adapters: what finetuning has learned, as plain tensors by name, and several of them on one network.

An adapter is a dictionary from parameter names to tensors: the generators of every OFT layer, and whatever else is
trained (biases, norms, a head). It does not say how its generators are to be read: block sizes and parameterizations
are those of the network it is loaded into.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from orthotrain.checkpoint import compare_state
from orthotrain.errors import ConfigurationError
from orthotrain.layers import OftConv2d, OftEmbedding, OftLinear, OftRotation, mergeable_layers

OftLayer = OftLinear | OftConv2d | OftEmbedding


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


def rotation_of(layer: OftLayer) -> OftRotation:
    """Return the one rotation of an OFT layer, whichever side it turns."""
    return layer.rotation_out if isinstance(layer, OftEmbedding) else layer.rotation_in


def adapter_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that make up an adapter of this network: all generators, and all else that is trained.

    Raises:
        ConfigurationError: As :func:`oft_layers`.
    """
    generators = {id(rotation_of(layer).generators) for layer in oft_layers(network).values()}
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


@torch.no_grad()
def load_adapter_state(network: nn.Module, state: Mapping[str, Tensor], strict: bool = True) -> None:
    """Copy an adapter into a network; nothing is written unless all of it fits.

    Args:
        network: A network with OFT layers.
        state: What :func:`adapter_state` returned for this network or an equal one.
        strict: Whether both must name the same parameters; else those that only one of them names are left alone.

    Raises:
        ConfigurationError: If names or shapes differ, or the two have no name in common.
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
    for name in common:
        expected[name].copy_(state[name])


class AdapterSet:
    """Several named adapters on one network with OFT layers.

    The network holds the active one, so training goes on in it and :meth:`switch` keeps what it learned. An optimizer
    knows nothing of a switch: give every adapter an optimizer of its own, or reset its state.

    Args:
        network: A network with OFT layers; the values that it has now become the first adapter, and the active one.
        name: Name of that first adapter.

    Attributes:
        active: Name of the adapter that the network holds; None after a merge.
        merged: Names of the adapters that were folded into the frozen weights, in order.

    Raises:
        ConfigurationError: As :func:`oft_layers`.
    """

    def __init__(self, network: nn.Module, name: str = "default") -> None:
        self.network = network
        self.active: str | None = name
        self.merged: list[str] = []
        self._states = {name: adapter_state(network)}
        self._stale: set[str] = set()

    @property
    def names(self) -> list[str]:
        """Names of the adapters, in the order in which they were added."""
        return list(self._states)

    def state(self, name: str) -> dict[str, Tensor]:
        """Return a copy of an adapter, to save it for example.

        Raises:
            ConfigurationError: If there is no adapter of that name.
        """
        self._check(name)
        if name == self.active:
            return adapter_state(self.network)
        return {key: value.clone() for key, value in self._states[name].items()}

    def add(self, name: str, state: Mapping[str, Tensor] | None = None) -> None:
        """Add an adapter without switching to it.

        Args:
            name: A new name.
            state: Its values; None for generators of zero and everything else as the network has it now.

        Raises:
            ConfigurationError: If the name is taken, or the values do not fit the network.
        """
        if name in self._states:
            raise ConfigurationError(f"adapter {name!r} exists already; there are {self._listing()}: take another name")
        current = adapter_state(self.network)
        if state is None:
            rotations = {id(p) for layer in oft_layers(self.network).values() for p in layer.rotation_parameters()}
            parameters = adapter_parameters(self.network)
            state = {key: v.zero_() if id(parameters[key]) in rotations else v for key, v in current.items()}
        difference = compare_state(dict(state), current)
        if difference:
            raise ConfigurationError(f"adapter {name!r} does not fit the network: {difference}")
        self._states[name] = {key: state[key].detach().clone() for key in current}

    def remove(self, name: str) -> None:
        """Forget an adapter that is not active.

        Raises:
            ConfigurationError: If it is active, or there is none of that name.
        """
        self._check(name)
        if name == self.active:
            raise ConfigurationError(f"adapter {name!r} is active: switch to another one before removing it")
        del self._states[name]
        self._stale.discard(name)

    def switch(self, name: str, force: bool = False) -> None:
        """Keep the active adapter's values and copy those of another into the network.

        Args:
            name: The adapter to activate.
            force: Whether to take an adapter that was made before a merge, and so for other weights than these.

        Raises:
            ConfigurationError: If there is no such adapter, or it belongs to the weights before a merge.
        """
        self._check(name)
        if name in self._stale and not force:
            raise ConfigurationError(
                f"adapter {name!r} was made for the weights as they were before {', '.join(self.merged)} was merged: "
                "on the merged ones it is another function; remove it, reload the base, or pass force=True"
            )
        self._stale.discard(name)
        if name == self.active:
            return
        if self.active is not None:
            self._states[self.active] = adapter_state(self.network)
        load_adapter_state(self.network, self._states[name])
        self.active = name

    def enable(self) -> None:
        """Let the rotations act again."""
        for layer in oft_layers(self.network).values():
            layer.enabled = True

    def disable(self) -> None:
        """Compute what the base network does, until :meth:`enable`.

        Raises:
            ConfigurationError: If more than generators is trained: without the rotations that would not be the base.
        """
        layers = oft_layers(self.network)
        generators = {id(p) for layer in layers.values() for p in layer.rotation_parameters()}
        others = [name for name, p in adapter_parameters(self.network).items() if id(p) not in generators]
        if others:
            raise ConfigurationError(
                f"{others[0]} is trained besides the generators ({len(others)} such): disabling the rotations does not "
                "give the base network back; reload it instead"
            )
        for layer in layers.values():
            layer.enabled = False

    def merge(self, name: str, force: bool = False) -> None:
        """Fold one adapter into the frozen weights; it leaves the set, and no adapter is active afterwards.

        The function of the network with that adapter stays what it was. The other adapters are kept, but they were made
        for the weights before the merge: :meth:`switch` refuses them from now on unless forced.

        Args:
            name: The adapter to merge.
            force: As for :meth:`switch`.

        Raises:
            ConfigurationError: As :meth:`switch`; or if the rotations are disabled.
        """
        self._check(name)
        layers = oft_layers(self.network).values()
        if not all(layer.enabled for layer in layers):
            raise ConfigurationError(f"the rotations are disabled: call enable() before merging adapter {name!r}")
        self.switch(name, force)
        for layer in layers:
            layer.merge_()
        del self._states[name]
        self._stale = set(self._states)
        self.merged.append(name)
        self.active = None

    def _check(self, name: str) -> None:
        if name in self.merged and name not in self._states:
            raise ConfigurationError(f"adapter {name!r} was merged and is gone; there are {self._listing()}")
        if name not in self._states:
            raise ConfigurationError(f"there is no adapter {name!r}; there are {self._listing()}")

    def _listing(self) -> str:
        return ", ".join(self._states) or "none"
