"""Folding and merging many layers: displacements are computed together, sharded layers are gathered one at a time."""

from collections.abc import Iterator, Mapping

import torch
from torch.optim import Optimizer

from orthotrain.devices.host_reads import LateValues, read_waits
from orthotrain.layers.finite_checks import FiniteChecks
from orthotrain.layers.protocols import Foldable, Mergeable
from orthotrain.layers.rotation.block_rotation import BlockRotation
from orthotrain.layers.rotation.displacement_pool import pooled
from orthotrain.layers.sharding import gathered
from orthotrain.layers.spectrum import largest_bounds

POOLED_GENERATORS = 2**23
"""Number of generators whose displacements are computed together in a fold: 64 MiB of displacements in fp32."""


def merge_rotations(layers: Mapping[str, Mergeable], optimizers: list[Optimizer]) -> FiniteChecks:
    """Merge layers and drop the optimizers' state of their generators.

    Args:
        layers: Name -> layer.
        optimizers: Optimizers that may hold the generators: any that keeps a dictionary of per-parameter state and
            fills it at the first step.

    Returns:
        The checks that the host has not read yet: none on a CPU.

    Raises:
        TrainingDiverged: If the rotations of a layer are not finite, naming the layer, which keeps its weight.
    """
    checks = FiniteChecks()
    for name, layer in layers.items():
        with checks.of(name), gathered(layer):  # sharded layers one at a time
            layer.merge_()
        for parameter in layer.rotation_parameters():
            for optimizer in optimizers:
                optimizer.state.pop(parameter, None)
    return checks.send()


@torch.no_grad()
def fold_rotations(layers: Mapping[str, Foldable]) -> FiniteChecks:
    """Fold layers; permutations and the optimizers' state of the generators stay.

    Returns:
        The checks that the host has not read yet: none on a CPU.

    Raises:
        TrainingDiverged: If the rotations of a layer are not finite, naming the layer, which keeps its weight.
    """
    checks = FiniteChecks()
    for batch in _batches(layers):
        modules = (module for layer in batch.values() for module in layer.modules())  # type: ignore[attr-defined]
        with pooled(module for module in modules if isinstance(module, BlockRotation) and module.moved()):
            for name, layer in batch.items():
                with checks.of(name), gathered(layer):
                    layer.fold_()
    return checks.send()


def _batches(layers: Mapping[str, Foldable]) -> Iterator[dict[str, Foldable]]:
    """Yield layers in groups of about :data:`POOLED_GENERATORS`, whose displacements are computed together."""
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
    """Finds the layers whose generators have exceeded a norm.

    On a CPU the norms are measured at once. On a device, reading a norm would make the host wait at every step; there
    the norms of the last :meth:`measure` are used, and a layer is found one step later.

    Args:
        norm: Largest allowed bound of a block's ``||Q||_2``.
    """

    def __init__(self, norm: float) -> None:
        self._norm = norm
        self._measured: LateValues | None = None

    @torch.no_grad()
    def measure(self, layers: Mapping[str, Mergeable]) -> None:
        """Measure the layers for the next :meth:`beyond`, without waiting for a device."""
        self._measured = LateValues(largest_bounds(layers) > self._norm)

    def beyond(self, layers: Mapping[str, Mergeable]) -> dict[str, Mergeable]:
        """Return the layers beyond the norm: measured now on a CPU, at the last :meth:`measure` on a device."""
        if not read_waits(next(iter(layers.values())).rotation_parameters()[0].device):
            self.measure(layers)
        measured, self._measured = self._measured, None
        beyond = [False] * len(layers) if measured is None else measured.tolist()
        return {name: layer for (name, layer), far in zip(layers.items(), beyond, strict=True) if far}

    def forget(self) -> None:
        """Drop the last measurement, after the layers have been merged."""
        self._measured = None
