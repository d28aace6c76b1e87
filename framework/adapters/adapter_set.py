"""Several adapters on one network: add, switch, disable, merge one."""

from collections.abc import Mapping

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from orthotrain.adapters.state import adapter_parameters, adapter_state, load_adapter_state, oft_layers
from orthotrain.checkpoints.reading import compare_state
from orthotrain.console.progress import shown
from orthotrain.errors import ConfigurationError
from orthotrain.layers import OftLinear


class AdapterSet:
    """Several named adapters on one network with OFT layers.

    The network holds the active one, so training goes on in it and :meth:`switch` keeps what it learned. After a merge
    it holds none: what is trained then belongs to no adapter until :meth:`add` takes it. An optimizer knows nothing of
    a switch: give every adapter an optimizer of its own, or reset its state.

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
        self._after_merge: dict[str, Tensor] = {}
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
            force: Whether to take an adapter that was made before a merge, and so for other weights than these, and to
                lose what was trained after a merge.

        Raises:
            ConfigurationError: If there is no such adapter, it belongs to the weights before a merge, or the network
                was trained after a merge and no adapter holds what it has learned.
        """
        self._check(name)
        if name in self._stale and not force:
            raise ConfigurationError(
                f"adapter {name!r} was made for the weights as they were before {', '.join(self.merged)} was merged: "
                "on the merged ones it is another function; remove it, reload the base, or pass force=True"
            )
        if not force:
            self._refuse_to_lose()
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

    def merge(self, name: str, force: bool = False) -> dict[str, float]:
        """Fold one adapter into the frozen weights; it leaves the set, and no adapter is active afterwards.

        The function of the network with that adapter stays what it was, but for what requantising loses. The other
        adapters are kept, but they were made for the weights before the merge: :meth:`switch` refuses them from now on
        unless forced.

        Args:
            name: The adapter to merge.
            force: As for :meth:`switch`.

        Returns:
            Layer name -> relative error (Frobenius) of storing its rotated weight, for quantised layers; logged too.

        Raises:
            ConfigurationError: As :meth:`switch`; or if the rotations are disabled.
        """
        self._check(name)
        layers = oft_layers(self.network)
        if not all(layer.enabled for layer in layers.values()):
            raise ConfigurationError(f"the rotations are disabled: call enable() before merging adapter {name!r}")
        self.switch(name, force)
        errors = {}
        with shown(layers.items(), "merging", "layers") as named:
            for layer_name, layer in named:
                layer.merge_()
                if isinstance(layer, OftLinear) and layer.last_merge_error is not None:
                    errors[layer_name] = layer.last_merge_error
        del self._states[name]
        self._stale = set(self._states)
        self.merged.append(name)
        self.active, self._after_merge = None, adapter_state(self.network)
        _tell_errors(name, errors)
        return errors

    def _refuse_to_lose(self) -> None:
        """Refuse to overwrite what was trained after a merge, when no adapter is active to keep it."""
        if self.active is not None:
            return
        now = adapter_state(self.network)
        if not any(_equal(now, state) for state in (self._after_merge, *self._states.values())):
            raise ConfigurationError(
                f"the network was trained after {self.merged[-1]!r} was merged, and no adapter holds what it learned: "
                "keep it with add(NAME, adapter_state(network)), or pass force=True to lose it"
            )

    def _check(self, name: str) -> None:
        if name in self.merged and name not in self._states:
            raise ConfigurationError(f"adapter {name!r} was merged and is gone; there are {self._listing()}")
        if name not in self._states:
            raise ConfigurationError(f"there is no adapter {name!r}; there are {self._listing()}")

    def _listing(self) -> str:
        return ", ".join(self._states) or "none"


def _tell_errors(name: str, errors: Mapping[str, float]) -> None:
    if not errors:
        return
    worst, mean = max(errors, key=errors.__getitem__), sum(errors.values()) / len(errors)
    rank_zero_info(
        f"merged {name!r}: requantising {len(errors)} weights lost {mean:.2%} of one on average, at most "
        f"{errors[worst]:.2%} in {worst}"
    )


def _equal(state: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return state.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in state.items())
