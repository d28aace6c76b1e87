"""All displacements of a network in one call: rotations of one block size together, once in each forward pass."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from orthotrain.layers.rotation.block_rotation import BlockRotation, PooledDisplacements


class DisplacementPool:
    """Computes the displacements of many rotations as one batch, and gives each rotation its part.

    Alone, each layer would call a few small operations in forward and backward, and a network has hundreds of layers.
    The pool exists from the beginning to the end of the network's forward pass. Without a pool each rotation computes
    its own displacement: outside the network's forward pass, where a layer is compiled and the network is not, with
    sharded generators, and under the activation checkpointing of transformers, whose recomputation runs after the
    forward pass. A network that is compiled as a whole has the pool inside its graph.

    Args:
        network: The network, which gets two hooks. Its rotations are found in every forward pass, so layers may be
            replaced at any time.
    """

    def __init__(self, network: nn.Module) -> None:
        self._filled: list[BlockRotation] = []
        for module in network.modules():
            if isinstance(module, BlockRotation):
                module.parameterization.config()  # finds the names of the arguments now, because that cannot be traced
        network.register_forward_pre_hook(self._fill)
        network.register_forward_hook(self._drain, always_call=True)

    def _fill(self, network: nn.Module, arguments: Any) -> None:
        rotations = []
        for module in network.modules():
            if getattr(module, "gradient_checkpointing", False):  # transformers sets it where it recomputes
                return
            if isinstance(module, BlockRotation) and not module.known_identity:
                rotations.append(module)
        self._filled += pool(rotations)

    def _drain(self, network: nn.Module, arguments: Any, output: Any) -> None:
        for rotation in self._filled:
            rotation.pooled = None
        self._filled.clear()


@contextmanager
def pooled(rotations: Iterable[BlockRotation]) -> Iterator[None]:
    """Give rotations displacements that are computed together, inside the ``with`` block."""
    filled = pool(rotations)
    try:
        yield
    finally:
        for rotation in filled:
            rotation.pooled = None


def pool(rotations: Iterable[BlockRotation]) -> list[BlockRotation]:
    """Give rotations with equal block size and parameterization pooled displacements; return these rotations."""
    groups: dict[Any, list[BlockRotation]] = {}
    for rotation in rotations:
        generators = rotation.generators
        if not isinstance(generators, DTensor):
            # parameterizations are compared by their values, because torch.compile compares objects by identity
            same_map = (type(rotation.parameterization), *rotation.parameterization.config()["init_args"].items())
            # a network may lie on several devices (device_map), or be cast in part
            key = (rotation.block_size, same_map, generators.device, generators.dtype)
            groups.setdefault(key, []).append(rotation)
    shared = [group for group in groups.values() if len(group) > 1]
    for group in shared:
        displacements = PooledDisplacements(group)
        for position, rotation in enumerate(group):
            rotation.pooled = (displacements, position)
    return [rotation for group in shared for rotation in group]
