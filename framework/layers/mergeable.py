"""What callbacks and export know of a layer: how to fold its rotation away."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from orthotrain.errors import ConfigurationError


@runtime_checkable
class Mergeable(Protocol):
    """A layer whose rotations can be folded into its frozen weight without changing its function."""

    def merge_(self) -> None:
        """Fold the rotations into the frozen weight, reset them to the identity and draw the next permutations."""

    def merged_weight(self) -> Tensor:
        """Return the effective weight of the plain layer that computes the same."""

    def rotation_parameters(self) -> list[nn.Parameter]:
        """Return the generators: the parameters that a merge resets."""

    def displacements(self) -> list[Tensor]:
        """Return ``D = R - I`` of every rotation, ``(n, b, b)`` each."""

    def unwrap(self) -> nn.Module:
        """Return a plain torch module that computes the same, with the merged weight."""


@runtime_checkable
class Foldable(Mergeable, Protocol):
    """A layer that can also be folded without drawing the next permutations."""

    def fold_(self) -> None:
        """Fold the rotations into the frozen weight and reset them; the permutations stay as they are."""


@runtime_checkable
class Stepwise(Foldable, Protocol):
    """A layer that computes without its rotations, and so must be folded after every step."""

    def movement(self) -> Tensor:
        """Return the root mean square of what a fold would change over that of the weight, a scalar."""

    def check_storage(self, name: str) -> None:
        """Refuse a weight that is stored too coarsely to be folded every step.

        Raises:
            ConfigurationError: With the ``name`` of the layer and what would work.
        """


@runtime_checkable
class Counting(Protocol):
    """A layer that counts its merges in buffers."""

    def read_counts(self) -> None:
        """Read the counts from the device, so that no later merge waits for them."""


@dataclass(frozen=True)
class SideCoverage:
    """How far rotations have reached on one side of a layer since the start, the present period included.

    Args:
        periods: ``(width,)`` int64: in how many merge periods a coordinate lay in a block.
        pairs: Part of all pairs of coordinates that have lain in one block at least once, estimated from a sample.
    """

    periods: Tensor
    pairs: float


@runtime_checkable
class Covering(Protocol):
    """A layer whose blocks cover other coordinates after each merge."""

    def coverage(self) -> dict[str, SideCoverage]:
        """Return the coverage of each rotated side, ``in`` and ``out``."""


@runtime_checkable
class Scaled(Protocol):
    """A layer that may have a trained factor, which its merged weight contains and its rotations do not change."""

    def trained_factor(self) -> float | None:
        """Return the factor, None without one; a collective where it is sharded."""


def mergeable_layers(model: nn.Module) -> Iterator[tuple[str, Mergeable]]:
    """Yield ``(name, layer)`` for every :class:`Mergeable` in the model, shared ones once, in module order."""
    for name, module in model.named_modules():
        if isinstance(module, Mergeable):
            yield name, module


MOST_MERGES = 1 << 31


def check_stored_counts(state: Mapping[str, Any], prefix: str, names: Iterable[str]) -> None:
    """Refuse to load counts of merges that are none: seeds are made of them.

    Args:
        state: A state dict.
        prefix: What the names of the layer begin with in it.
        names: Its counts; those that are not in the state dict, or have another shape, are refused by torch.

    Raises:
        ConfigurationError: Naming the layer, the count and its value.
    """
    for name in names:
        stored = state.get(f"{prefix}{name}")
        if not isinstance(stored, Tensor) or stored.ndim or stored.is_meta or isinstance(stored, FakeTensor):
            continue
        if stored.dtype != torch.int64 or not 0 <= int(stored) < MOST_MERGES:
            raise ConfigurationError(f"{prefix}{name} is {stored.item()} ({stored.dtype}), which is no count of merges")
