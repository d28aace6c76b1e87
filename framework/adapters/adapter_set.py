"""Several adapters on one network: add, switch, disable and merge adapters."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from orthotrain.adapters.row_rotations import rotating
from orthotrain.adapters.state import (
    adapter_parameters,
    adapter_state,
    check_generators_alone,
    load_adapter_state,
    oft_layers,
)
from orthotrain.checkpoints.reading import compare_state
from orthotrain.console.progress import shown
from orthotrain.errors import ConfigurationError
from orthotrain.layers import OftLayer, OftLinear


class AdapterSet:
    """Several named adapters on one network with OFT layers.

    The network holds the parameters of the active adapter, so that training changes the active adapter, and
    :meth:`switch` stores its new values. After a merge no adapter is active: values that are trained then belong to no
    adapter until :meth:`add` is called with them. A switch does not change the optimizer: give each adapter its own
    optimizer, or reset the state of the optimizer.

    Args:
        network: A network with OFT layers. Its present values become the first adapter, which is active.
        name: Name of the first adapter.

    Attributes:
        active: Name of the active adapter; None after a merge.
        merged: Names of the adapters that were merged into the frozen weights, in order.

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
        """Return a copy of an adapter, for example to save it.

        Raises:
            ConfigurationError: There is no adapter of this name.
        """
        self._check(name)
        if name == self.active:
            return adapter_state(self.network)
        return {key: value.clone() for key, value in self._states[name].items()}

    def add(self, name: str, state: Mapping[str, Tensor] | None = None) -> None:
        """Add an adapter without switching to it.

        Args:
            name: A new name.
            state: Values of the adapter. None gives generators of zero, and all other parameters as they are in the
                network now.

        Raises:
            ConfigurationError: The name is in use, or the values do not fit the network.
        """
        if name in self._states:
            raise ConfigurationError(f"adapter {name!r} exists already; there are {self._listing()}: take another name")
        current = adapter_state(self.network)
        if state is None:
            rotations = {id(p) for layer in oft_layers(self.network).values() for p in layer.rotation_parameters()}
            parameters = adapter_parameters(self.network)
            state = {key: v.zero_() if id(parameters[key]) in rotations else v for key, v in current.items()}
        if difference := compare_state(state, current):
            raise ConfigurationError(f"adapter {name!r} does not fit the network: {difference}")
        self._states[name] = {key: state[key].detach().clone() for key in current}

    def remove(self, name: str) -> None:
        """Remove an adapter that is not active.

        Raises:
            ConfigurationError: The adapter is active, or there is no adapter of this name.
        """
        self._check(name)
        if name == self.active:
            raise ConfigurationError(f"adapter {name!r} is active: switch to another one before removing it")
        del self._states[name]
        self._stale.discard(name)

    def switch(self, name: str, force: bool = False) -> None:
        """Store the values of the active adapter, and copy those of another adapter into the network.

        Args:
            name: The adapter to activate.
            force: Whether to accept an adapter that was trained before a merge, for other frozen weights; and to lose
                values that were trained after a merge.

        Raises:
            ConfigurationError: There is no such adapter; or, without ``force``, the adapter belongs to the weights
                before a merge, or the network was trained after a merge and no adapter has these values.
        """
        self._check(name)
        if not force:
            self._check_fresh(name)
            self._check_nothing_is_lost()
        self._stale.discard(name)
        if name == self.active:
            return
        if self.active is not None:
            self._states[self.active] = adapter_state(self.network)
        load_adapter_state(self.network, self._states[name])
        self.active = name

    def enable(self) -> None:
        """Apply the rotations again."""
        for layer in oft_layers(self.network).values():
            layer.enabled = True

    def disable(self) -> AbstractContextManager[None]:
        """Leave the rotations out, so that the network computes the function of the base network, until :meth:`enable`.

        Returns:
            A context, at whose end the rotations are applied again: ``with adapters.disable(): ...``.

        Raises:
            ConfigurationError: Other parameters than generators are trained: the network would not be the base network.
        """
        check_generators_alone(self.network)
        for layer in oft_layers(self.network).values():
            layer.enabled = False
        return self._disabled()

    def together(self, *names: str) -> AbstractContextManager[None]:
        """Rotate by several adapters, one after the other in the given order, inside a ``with`` block.

        The adapters have the values that they have at the start of the block, and get no gradient.

        Raises:
            ConfigurationError: As :meth:`rows`.
        """
        if not names:
            raise ConfigurationError(f"give the names of the adapters that act together; there are {self._listing()}")
        states = [self._usable(name) for name in names]
        return rotating(oft_layers(self.network), [states], None)

    def rows(self, names: Sequence[str | None]) -> AbstractContextManager[None]:
        """Give each row of a batch an adapter of its own inside a ``with`` block, for inference in one forward pass.

        Rows are the first dimension of the input of each OFT layer. The adapters have the values that they have at the
        start of the block, and get no gradient.

        Args:
            names: Name of the adapter of each row; None for no rotation.

        Raises:
            ConfigurationError: There is no adapter of a name; it was made for other frozen weights; or other parameters
                than generators are trained, which all rows would share. Inside the block: a layer gets another number
                of rows.
        """
        distinct = list(dict.fromkeys(names))
        chains = [[] if name is None else [self._usable(name)] for name in distinct]
        return rotating(oft_layers(self.network), chains, [distinct.index(name) for name in names])

    def _usable(self, name: str) -> dict[str, Tensor]:
        """Return the values of an adapter for use beside others."""
        self._check(name)
        self._check_fresh(name)
        check_generators_alone(self.network)
        return self.state(name)

    @contextmanager
    def _disabled(self) -> Iterator[None]:
        try:
            yield
        finally:
            self.enable()

    def merge(self, name: str, force: bool = False) -> dict[str, float]:
        """Merge one adapter into the frozen weights and remove it. No adapter is active afterwards.

        The function of the network with this adapter does not change, except for the error of quantizing its weights
        again. The other adapters were trained for the weights before the merge: :meth:`switch` refuses them from now on
        without ``force``.

        Args:
            name: The adapter to merge.
            force: As for :meth:`switch`.

        Returns:
            Layer name -> relative error (Frobenius norm) of quantizing the rotated weight. The errors are logged too.

        Raises:
            ConfigurationError: As :meth:`switch`; the rotations are disabled; or a rotation of the adapter is not
                finite. Then nothing is folded.
        """
        self._check(name)
        layers = oft_layers(self.network)
        if not all(layer.enabled for layer in layers.values()):
            raise ConfigurationError(f"the rotations are disabled: call enable() before merging adapter {name!r}")
        before = self.active, adapter_state(self.network), set(self._stale)
        self.switch(name, force)
        try:
            _check_rotations(name, layers)
        except ConfigurationError:
            self.active, state, self._stale = before
            _write(self.network, state)
            raise
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
        if errors:
            worst, mean = max(errors, key=errors.__getitem__), sum(errors.values()) / len(errors)
            rank_zero_info(
                f"merged {name!r}: {len(errors)} weights were quantized again, with a mean relative error of "
                f"{mean:.2%} and at most {errors[worst]:.2%} in {worst}"
            )
        return errors

    def _check_nothing_is_lost(self) -> None:
        """Refuse to overwrite values that were trained after a merge, while no adapter is active."""
        if self.active is not None:
            return
        now = adapter_state(self.network)
        if not any(_equal(now, state) for state in (self._after_merge, *self._states.values())):
            raise ConfigurationError(
                f"the network was trained after {self.merged[-1]!r} was merged, and no adapter has its values: "
                "keep them with add(NAME, adapter_state(network)), or pass force=True to lose them"
            )

    def _check_fresh(self, name: str) -> None:
        if name in self._stale:
            raise ConfigurationError(
                f"adapter {name!r} was made for the weights before {', '.join(self.merged)} was merged: with the new "
                "weights it gives another network; remove it, reload the base, or pass force=True"
            )

    def _check(self, name: str) -> None:
        if name in self.merged and name not in self._states:
            raise ConfigurationError(f"adapter {name!r} was merged and removed; there are {self._listing()}")
        if name not in self._states:
            raise ConfigurationError(f"there is no adapter {name!r}; there are {self._listing()}")

    def _listing(self) -> str:
        return ", ".join(self._states) or "none"


@torch.no_grad()
def _check_rotations(name: str, layers: Mapping[str, OftLayer]) -> None:
    for layer_name, layer in layers.items():
        if not all(bool(torch.isfinite(d).all()) for d in layer.displacements()):
            raise ConfigurationError(
                f"adapter {name!r}: the rotation of {layer_name} holds NaN or infinite values, and nothing was merged; "
                "take values from before its run diverged"
            )


@torch.no_grad()
def _write(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    for name, parameter in adapter_parameters(network).items():
        parameter.copy_(state[name])


def _equal(state: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return state.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in state.items())
