"""Several adapters in one forward pass: one after the other, or another adapter for each row of a batch."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from orthotrain.adapters.state import generator_names
from orthotrain.errors import ConfigurationError
from orthotrain.layers import OftLayer, OftRotation


class RowRotation:
    """Rotates the rows of a batch by different generators; takes the place of the rotation of one layer.

    The adapters get no gradient.

    Args:
        name: Name of the layer, for messages.
        rotation: The rotation of the layer, for its settings.
        generators: Generators of each group of rows, applied one after the other.
        groups: Group of each row, as a position in ``generators``; None for one group that takes any number of rows.
    """

    def __init__(
        self, name: str, rotation: OftRotation, generators: Sequence[Sequence[Tensor]], groups: Sequence[int] | None
    ) -> None:
        self.name, self.rotation, self.generators, self.groups = name, rotation, generators, groups
        self._displacements: dict[tuple[int, int, torch.dtype], Tensor] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate ``x (..., d)``, whose first dimension are the rows, if there are groups."""
        if self.groups is None:
            return self._rotated(x, 0)
        if x.ndim < 2 or x.shape[0] != len(self.groups):
            raise ConfigurationError(
                f"layer {self.name}: its input {tuple(x.shape)} does not have the {len(self.groups)} rows that were "
                "given adapters as its first dimension: the network mixes or repeats rows (experts, beams); run each "
                "adapter on its own rows"
            )
        order = sorted(range(len(self.groups)), key=self.groups.__getitem__)
        places = torch.tensor(order, device=x.device).split([self.groups.count(k) for k in range(len(self.generators))])
        parts = [self._rotated(x[rows], group) for group, rows in enumerate(places)]
        return torch.cat(parts)[torch.tensor(order).argsort().to(x.device)]

    def _rotated(self, x: Tensor, group: int) -> Tensor:
        for position in range(len(self.generators[group])):
            x = self.rotation.rotate(x, partial(self._displacement, group, position))
        return x

    @torch.inference_mode(False)  # a later pass may need a gradient for its input
    @torch.no_grad()
    def _displacement(self, group: int, place: int, dtype: torch.dtype) -> Tensor:
        key = group, place, dtype
        if key not in self._displacements:
            self._displacements[key] = self.rotation.displacement_of(self.generators[group][place], dtype)
        return self._displacements[key]


@contextmanager
def rotating(
    layers: Mapping[str, OftLayer], chains: Sequence[Sequence[Mapping[str, Tensor]]], groups: Sequence[int] | None
) -> Iterator[None]:
    """Let layers rotate by the adapters of ``chains`` inside the block.

    Args:
        layers: Name -> layer.
        chains: Adapters of each group of rows, applied one after the other.
        groups: Group of each row; None for one group of all rows.
    """
    before = {layer: layer.rotation.instead for layer in layers.values()}
    try:
        for name, key in generator_names(layers).items():
            layer, generators = layers[name], [[state[key] for state in chain] for chain in chains]
            layer.rotation.instead = RowRotation(name, layer.rotation, generators, groups)
        yield
    finally:
        for layer, instead in before.items():
            layer.rotation.instead = instead
