"""Folding many layers: together where that is faster, one at a time where they are sharded."""

from collections.abc import Iterator, Mapping

import torch
from torch.optim import Optimizer

from orthotrain.devices.host_reads import LateValues, read_waits
from orthotrain.layers.finite import FiniteLooks
from orthotrain.layers.mergeable import Foldable, Mergeable
from orthotrain.layers.rotation.block_rotation import BlockRotation
from orthotrain.layers.rotation.displacement_pool import pooled
from orthotrain.layers.sharding import gathered
from orthotrain.layers.spectrum import largest_bounds

POOLED_GENERATORS = 2**23
"""Generators whose displacements are computed at once when layers fold: 64 MiB of displacements in fp32."""


def merge_rotations(layers: Mapping[str, Mergeable], optimizers: list[Optimizer]) -> None:
    """Merge layers and drop the optimizers' state of their generators.

    Args:
        layers: Name -> layer.
        optimizers: Optimizers that may hold the generators; torch's, fused or not, or any other that keeps a
            dictionary of per-parameter state and fills it at the first step.

    Raises:
        TrainingDiverged: If a layer's merged weight would not be finite, naming the layer. Its old weight stays.
    """
    looks = FiniteLooks()
    for name, layer in layers.items():
        with looks.of(name), gathered(layer):  # sharded layers one at a time
            layer.merge_()
        for parameter in layer.rotation_parameters():
            for optimizer in optimizers:
                optimizer.state.pop(parameter, None)
    looks.send().look()


@torch.no_grad()
def fold_rotations(layers: Mapping[str, Foldable]) -> FiniteLooks:
    """Fold layers, keeping their permutations and the optimizers' state of their generators.

    Returns:
        The looks at the folded weights that the host has not taken yet: none on a CPU, where it has taken all.

    Raises:
        TrainingDiverged: If a layer's folded weight would not be finite, naming the layer. Its old weight stays.
    """
    looks = FiniteLooks()
    for batch in _batches(layers):
        modules = (module for layer in batch.values() for module in layer.modules())  # type: ignore[attr-defined]
        with pooled(module for module in modules if isinstance(module, BlockRotation) and module.moved()):
            for name, layer in batch.items():
                with looks.of(name), gathered(layer):
                    layer.fold_()
    return looks.send()


def _batches(layers: Mapping[str, Foldable]) -> Iterator[dict[str, Foldable]]:
    """Yield layers whose displacements are computed together: enough to be fast, few enough to be small."""
    batch: dict[str, Foldable] = {}
    size = 0
    for name, layer in layers.items():
        batch[name] = layer
        size += sum(generators.numel() for generators in layer.rotation_parameters())
        if size >= POOLED_GENERATORS:
            yield batch
            batch, size = {}, 0
    if batch:
        yield batch


class NormWatch:
    """Tells which layers have gone beyond a norm.

    On a CPU the answer is that of the moment. On a device the host would wait for it at every step. There the answer is
    that of the call before, and a layer goes on for one more step.

    Args:
        norm: The largest bound of a block's ``||Q||_2`` that is within.
    """

    def __init__(self, norm: float) -> None:
        self._norm = norm
        self._measured: LateValues | None = None

    @torch.no_grad()
    def measure(self, layers: Mapping[str, Mergeable]) -> None:
        """Measure the layers for the next :meth:`beyond`, without waiting for a device."""
        self._measured = LateValues(largest_bounds(layers) > self._norm)

    def beyond(self, layers: Mapping[str, Mergeable]) -> dict[str, Mergeable]:
        """Return the layers that have gone beyond the norm: now on a CPU, at the last :meth:`measure` on a device."""
        if not read_waits(next(iter(layers.values())).rotation_parameters()[0].device):
            self.measure(layers)
        measured, self._measured = self._measured, None
        found = [False] * len(layers) if measured is None else measured.tolist()
        return {name: layer for (name, layer), far in zip(layers.items(), found, strict=True) if far}

    def forget(self) -> None:
        """Drop what was measured: the layers have been merged since."""
        self._measured = None
