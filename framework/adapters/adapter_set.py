"""Several adapters on one network: add, switch, disable and merge adapters."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

from torch import Tensor, nn

from orthotrain.adapters.merging import (
    Merge,
    check_acting,
    check_made_for,
    check_not_quantized,
    check_rotations,
    equal,
    merge_layers,
    write,
)
from orthotrain.adapters.row_rotations import rotating
from orthotrain.adapters.state import (
    adapter_parameters,
    adapter_state,
    check_generators_alone,
    chosen_layers,
    generator_names,
    load_adapter_state,
    oft_layers,
)
from orthotrain.checkpoints.reading import compare_state
from orthotrain.errors import ConfigurationError


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

    Raises:
        ConfigurationError: As :func:`oft_layers`.
    """

    def __init__(self, network: nn.Module, name: str = "default") -> None:
        self.network = network
        self.active: str | None = name
        self._states = {name: adapter_state(network)}
        self._merges: list[Merge] = []
        self._made_for: dict[str, tuple[Merge, ...]] = {name: ()}
        self._left_out: dict[str, frozenset[str]] = {name: frozenset()}
        self._frozen: list[nn.Parameter] = []
        self._after_merge: dict[str, Tensor] = {}

    @property
    def names(self) -> list[str]:
        """Names of the adapters, in the order in which they were added."""
        return list(self._states)

    @property
    def merged(self) -> list[str]:
        """Names of the adapters that are merged into the frozen weights, in order."""
        return [merge.name for merge in self._merges]

    def state(self, name: str) -> dict[str, Tensor]:
        """Return a copy of an adapter, for example to save it.

        Raises:
            ConfigurationError: There is no adapter of this name.
        """
        self._check(name)
        return {key: value for key, value in self._values(name).items() if key not in self._left_out[name]}

    def add(self, name: str, state: Mapping[str, Tensor] | None = None, layers: Sequence[str] | None = None) -> None:
        """Add an adapter without switching to it.

        Args:
            name: A new name.
            state: Values of the adapter. None gives generators of zero, and all other parameters as they are in the
                network now.
            layers: Layers that the adapter rotates: globs on their names, or the last parts of their names; None for
                all layers. The adapter has no generators of other layers, and they are not trained while it is active.

        Raises:
            ConfigurationError: The name is in use, the values do not fit the network, or a pattern matches no layer.
        """
        if name in self._states:
            raise ConfigurationError(f"adapter {name!r} exists already; there are {self._listing()}: take another name")
        values, generators = adapter_state(self.network), generator_names(oft_layers(self.network))
        for key in generators.values():
            values[key].zero_()
        left_out = frozenset(generators[layer] for layer in generators.keys() - chosen_layers(generators, layers))
        if state is not None:
            if difference := compare_state(state, {key: v for key, v in values.items() if key not in left_out}):
                raise ConfigurationError(f"adapter {name!r} does not fit the network: {difference}")
            values |= {key: value.detach().clone() for key, value in state.items()}
        self._states[name], self._left_out[name] = values, left_out
        self._made_for[name] = tuple(self._merges)

    def remove(self, name: str) -> None:
        """Remove an adapter that is not active.

        Raises:
            ConfigurationError: The adapter is active, or there is no adapter of this name.
        """
        self._check(name)
        if name == self.active:
            raise ConfigurationError(f"adapter {name!r} is active: switch to another one before removing it")
        del self._states[name], self._made_for[name], self._left_out[name]

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
            check_made_for(name, self._made_for[name], self._merges)
            self._check_nothing_is_lost()
        self._made_for[name] = tuple(self._merges)
        if name == self.active:
            return
        self._keep_active()
        load_adapter_state(self.network, self._states[name])
        self._activate(name)

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
        check_made_for(name, self._made_for[name], self._merges)
        check_generators_alone(self.network)
        return self._values(name)

    @contextmanager
    def _disabled(self) -> Iterator[None]:
        try:
            yield
        finally:
            self.enable()

    def merge(self, name: str, force: bool = False) -> dict[str, float]:
        """Merge one adapter into the frozen weights and remove it, until :meth:`unmerge`. No adapter is active then.

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
        check_acting("merging", name, layers)
        before = self.active, adapter_state(self.network), dict(self._made_for)
        self.switch(name, force)
        try:
            check_rotations(name, layers)
        except ConfigurationError:
            active, state, self._made_for = before
            write(self.network, state)
            self._activate(active)
            raise
        self._merges.append(Merge(name, adapter_state(self.network), self._left_out[name]))
        errors = merge_layers(name, layers)
        del self._states[name], self._made_for[name], self._left_out[name]
        self._activate(None)
        self._after_merge = adapter_state(self.network)
        return errors

    def unmerge(self, force: bool = False) -> str:
        """Undo the last merge, and make its adapter active again.

        The frozen weights come back up to a rounding of their dtype. Adapters that were made for these weights can be
        switched to again. Those that were made since are refused without ``force``.

        Args:
            force: Whether to lose values that were trained after the merge.

        Returns:
            The name of the adapter.

        Raises:
            ConfigurationError: Nothing is merged; a weight is quantized, so that its values before the merge are lost;
                there is a new adapter of this name; the rotations are disabled; or, without ``force``, the network was
                trained after the merge and no adapter has these values. Then nothing is changed.
        """
        if not self._merges:
            raise ConfigurationError(f"no adapter is merged; there are {self._listing()}")
        merge, layers = self._merges[-1], oft_layers(self.network)
        if merge.name in self._states:
            raise ConfigurationError(f"there is a new adapter {merge.name!r}: remove it before unmerging the old one")
        check_acting("unmerging", merge.name, layers)
        check_not_quantized(merge.name, layers)
        if not force:
            self._check_nothing_is_lost()
        self._keep_active()
        write(self.network, merge.state)
        for layer in layers.values():
            layer.unmerge_()
        self._merges.pop()
        self._states[merge.name], self._left_out[merge.name] = merge.state, merge.left_out
        self._made_for[merge.name] = tuple(self._merges)
        self._activate(merge.name)
        return merge.name

    def _values(self, name: str) -> dict[str, Tensor]:
        """Return a copy of the values of an adapter for all layers."""
        if name == self.active:
            return adapter_state(self.network)
        return {key: value.clone() for key, value in self._states[name].items()}

    def _activate(self, name: str | None) -> None:
        """Make an adapter active, so that only the generators of its layers are trained."""
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        parameters = adapter_parameters(self.network)
        left_out = [parameters[key] for key in self._left_out.get(name or "", ())]
        self.active, self._frozen = name, [parameter for parameter in left_out if parameter.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(False)
            parameter.grad = None  # an optimizer would still use it

    def _keep_active(self) -> None:
        if self.active is not None:
            self._states[self.active] = adapter_state(self.network)

    def _check_nothing_is_lost(self) -> None:
        """Refuse to overwrite values that were trained after a merge, while no adapter is active."""
        if self.active is not None:
            return
        now = adapter_state(self.network)
        if not any(equal(now, state) for state in (self._after_merge, *self._states.values())):
            raise ConfigurationError(
                f"the network was trained after {self.merged[-1]!r} was merged, and no adapter has its values: "
                "keep them with add(NAME, adapter_state(network)), or pass force=True to lose them"
            )

    def _check(self, name: str) -> None:
        if name in self.merged and name not in self._states:
            raise ConfigurationError(f"adapter {name!r} was merged and removed; there are {self._listing()}")
        if name not in self._states:
            raise ConfigurationError(f"there is no adapter {name!r}; there are {self._listing()}")

    def _listing(self) -> str:
        return ", ".join(self._states) or "none"
