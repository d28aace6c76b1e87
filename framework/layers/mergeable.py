"""What callbacks and export know of a layer: how to fold its rotation away."""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class Mergeable(Protocol):
    """A layer whose rotations can be folded into its frozen weight without changing its function."""

    def merge_(self) -> None:
        """Fold the rotations into the frozen weight and reset them to the identity."""

    def merged_weight(self) -> Tensor:
        """Return the effective weight of the plain layer that computes the same."""

    def rotation_parameters(self) -> list[nn.Parameter]:
        """Return the generators: the parameters that a merge resets."""

    def displacements(self) -> list[Tensor]:
        """Return ``D = R - I`` of every rotation, ``(n, b, b)`` each."""

    def unwrap(self) -> nn.Module:
        """Return a plain torch module that computes the same, with the merged weight."""


def mergeable_layers(model: nn.Module) -> Iterator[tuple[str, Mergeable]]:
    """Yield ``(name, layer)`` for every :class:`Mergeable` in the model, shared ones once, in module order."""
    for name, module in model.named_modules():
        if isinstance(module, Mergeable):
            yield name, module
