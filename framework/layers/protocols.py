"""The protocols through which callbacks and export use layers: merging, folding, counts, coverage, scale."""

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
    """A layer whose forward pass leaves out its rotations, so that they must be folded after every step."""

    def movement(self) -> Tensor:
        """Return the root mean square of the weight's change by a fold, over that of the weight; a scalar."""

    def check_storage(self, name: str) -> None:
        """Refuse a storage whose rounding is too coarse for a fold in every step.

        Raises:
            ConfigurationError: With the ``name`` of the layer and a storage that would work.
        """


@runtime_checkable
class Counting(Protocol):
    """A layer that counts its merges in buffers."""

    def read_counts(self) -> None:
        """Read the counts from the device, so that no later merge waits for them."""


@dataclass(frozen=True)
class SideCoverage:
    """Which features of one side of a layer have been in blocks since the start, the present period included.

    Args:
        periods: ``(width,)`` int64: the number of merge periods in which each feature was in a block.
        pairs: Share of all pairs of features that have been in one block at least once, estimated from a sample.
    """

    periods: Tensor
    pairs: float


@runtime_checkable
class Covering(Protocol):
    """A layer whose blocks hold other features after each merge."""

    def coverage(self) -> dict[str, SideCoverage]:
        """Return the coverage of each rotated side, ``in`` and ``out``."""


@runtime_checkable
class Scaled(Protocol):
    """A layer that may have a trained factor, which is part of its merged weight."""

    def trained_factor(self) -> float | None:
        """Return the factor, None for a layer without one; a collective where it is sharded."""


@runtime_checkable
class Packed(Protocol):
    """A weight whose parameters are not its numbers: a byte holds two of them, or scales stand beside them."""

    packed_numbers: int
    """Numbers of the weight."""

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Yield the stored tensors."""


def count_numbers(module: nn.Module, trained: bool | None = None) -> int:
    """Return the count of the parameters of a module; of a packed weight, its numbers and not the stored bytes.

    Args:
        module: Any module.
        trained: Whether only trained or only frozen parameters count; None for all.
    """
    own = sum(p.numel() for p in module.parameters() if trained in (None, p.requires_grad))
    packed = [part for part in module.modules() if isinstance(part, Packed)] if trained is not True else []
    return own + sum(part.packed_numbers - sum(p.numel() for p in part.parameters()) for part in packed)


def mergeable_layers(model: nn.Module) -> Iterator[tuple[str, Mergeable]]:
    """Yield ``(name, layer)`` for every :class:`Mergeable` in the model, shared ones once, in module order."""
    for name, module in model.named_modules():
        if isinstance(module, Mergeable):
            yield name, module


MOST_MERGES = 1 << 31


def check_stored_counts(state: Mapping[str, Any], prefix: str, names: Iterable[str]) -> None:
    """Refuse to load values that are no counts of merges: seeds are derived from the counts.

    Args:
        state: A state dict.
        prefix: Prefix of the layer's names in the state dict.
        names: The layer's counts. A count that is missing or has another shape is refused by torch.

    Raises:
        ConfigurationError: Naming the layer, the count and its value.
    """
    for name in names:
        stored = state.get(f"{prefix}{name}")
        if not isinstance(stored, Tensor) or stored.ndim or stored.is_meta or isinstance(stored, FakeTensor):
            continue
        if stored.dtype != torch.int64 or not 0 <= int(stored) < MOST_MERGES:
            raise ConfigurationError(f"{prefix}{name} is {stored.item()} ({stored.dtype}), which is no count of merges")
