"""Folding many layers: together where that is faster, one at a time where they are sharded."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch.optim import Optimizer

from orthotrain.errors import TrainingDiverged
from orthotrain.layers.block_rotation import BlockRotation
from orthotrain.layers.displacement_pool import pooled
from orthotrain.layers.mergeable import Foldable, Mergeable
from orthotrain.layers.sharding import gathered
from orthotrain.layers.spectral_bound import largest_bounds

POOLED_GENERATORS = 2**23
"""Generators whose displacements are computed at once when layers fold: 64 MiB of displacements in fp32."""


def merge_rotations(layers: Mapping[str, Mergeable], optimizers: list[Optimizer]) -> None:
    """Merge layers and drop the optimizers' state of their generators.

    Args:
        layers: Name -> layer.
        optimizers: Optimizers that may hold the generators; torch's, fused or not, or any other that keeps a
            dictionary of per-parameter state and fills it at the first step.

    Raises:
        TrainingDiverged: If a layer's merged weight would not be finite, naming the layer.
    """
    for name, layer in layers.items():
        with _named(name), gathered(layer):  # sharded layers one at a time
            layer.merge_()
        for parameter in layer.rotation_parameters():
            for optimizer in optimizers:
                optimizer.state.pop(parameter, None)


@torch.no_grad()
def fold_rotations(layers: Mapping[str, Foldable]) -> None:
    """Fold layers, keeping their permutations and the optimizers' state of their generators.

    Raises:
        TrainingDiverged: If a layer's folded weight would not be finite, naming the layer.
    """
    for batch in _batches(layers):
        modules = (module for layer in batch.values() for module in layer.modules())  # type: ignore[attr-defined]
        with pooled(module for module in modules if isinstance(module, BlockRotation) and module.moved()):
            for name, layer in batch.items():
                with _named(name), gathered(layer):
                    layer.fold_()


@contextmanager
def _named(layer: str) -> Iterator[None]:
    """Name the layer in the error of one that does not know its own name."""
    try:
        yield
    except TrainingDiverged as error:
        raise TrainingDiverged(f"{layer}: {error}") from error


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


@torch.no_grad()
def layers_beyond(layers: Mapping[str, Mergeable], norm: float) -> dict[str, Mergeable]:
    """Return the layers in which the bound of some block's ``||Q||_2`` exceeds ``norm``; one device synchronisation."""
    beyond = largest_bounds(layers) > norm
    return {name: layer for (name, layer), far in zip(layers.items(), beyond.tolist(), strict=True) if far}
