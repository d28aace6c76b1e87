"""Fully sharded networks (FSDP2): which parameters are gathered together, and gathering one layer to merge it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from orthotrain.errors import ConfigurationError
from orthotrain.layers.protocols import Mergeable
from orthotrain.layers.rotation.generator_marks import mark_generators, rotated_share


def shard_network(network: nn.Module, mesh: DeviceMesh) -> None:
    """Shard every parameter of a network over a mesh, in place.

    One collective gathers one group of parameters. In each block of the network (an element of an outermost
    ``nn.ModuleList``, such as a decoder layer) the mergeable layers are one group, and all other parameters another.
    The rest of the network, the embedding and the head, is the group of the root. The frozen weight of a layer and its
    generators are needed at the same time, so that one group for both saves a collective. Frozen weights have no
    gradients in FSDP2: outside the computation of its block, a frozen weight takes only the memory of its shard.

    Args:
        network: The network, which must be called through its ``forward``.
        mesh: One-dimensional, over all ranks.

    Raises:
        ConfigurationError: If the trained parameters of a group have two dtypes, whose gradients cannot be reduced
            together.
    """
    shares = {name: rotated_share(parameter) for name, parameter in network.named_parameters()}
    blocks = outermost_blocks(network)
    inside = {module for block in blocks for module in block.modules()}
    for block in blocks:
        layers = _mergeables(block)
        if layers:
            _check_one_dtype(layers, network)
            fully_shard(layers, mesh=mesh)
        if block not in layers:
            fully_shard(block, mesh=mesh)
    for layer in _mergeables(network):
        if layer not in inside:
            _check_one_dtype([layer], network)
            fully_shard(layer, mesh=mesh)
    fully_shard(network, mesh=mesh)
    # transformers reads this in `generate`: a rank whose answers have ended continues until all ranks have ended
    network._is_fsdp_managed_module = True  # type: ignore[assignment]
    for name, parameter in network.named_parameters():  # FSDP2 has made new parameters
        if (share := shares.get(name)) is not None:
            mark_generators(parameter, share)


def outermost_blocks(network: nn.Module) -> list[nn.Module]:
    """Return the elements of every ``nn.ModuleList`` that does not lie in another one."""
    blocks: list[nn.Module] = []
    pending = list(network.children())
    while pending:
        module = pending.pop(0)
        if isinstance(module, nn.ModuleList):
            blocks += [child for child in module if child not in blocks]
        else:
            pending += list(module.children())
    return blocks


def whole(tensor: Tensor) -> Tensor:
    """Return the full tensor of a sharded one (a collective), any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_sharded(module: nn.Module) -> bool:
    """Tell whether any parameter of a module is sharded."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


@contextmanager
@torch.no_grad()
def gathered(module: Any, frozen: bool = True) -> Iterator[None]:
    """Gather the sharded parameters of a module inside the ``with`` block, and write their new values to the shards.

    A collective: every rank enters with the same module and must change it in the same way, because each rank keeps its
    own part of its own result. Without sharded parameters nothing happens. Inside the block the module has new, whole
    parameters. Afterwards, also after an error, it has the sharded parameters again, which the optimizer knows.

    Args:
        module: The module.
        frozen: Whether frozen parameters are gathered too.
    """
    sharded = [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner._parameters.items()
        if isinstance(parameter, DTensor) and (frozen or parameter.requires_grad)
    ]
    for owner, name, parameter in sharded:
        owner._parameters[name] = nn.Parameter(parameter.full_tensor(), requires_grad=parameter.requires_grad)
    full = {}
    try:
        yield
        full = {(owner, name): owner._parameters[name] for owner, name, _ in sharded}
    finally:
        for owner, name, parameter in sharded:
            owner._parameters[name] = parameter
            if (result := full.get((owner, name))) is not None:
                part = distribute_tensor(result, parameter.device_mesh, parameter.placements, src_data_rank=None)
                parameter.to_local().copy_(part.to_local())


def _mergeables(module: nn.Module) -> list[nn.Module]:
    return [child for child in module.modules() if isinstance(child, Mergeable)]


def _check_one_dtype(layers: list[nn.Module], network: nn.Module) -> None:
    dtypes = {p.dtype: p for layer in layers for p in layer.parameters() if p.requires_grad}
    if len(dtypes) > 1:
        names = {id(p): name for name, p in network.named_parameters()}
        first, second = (f"{names[id(p)]} is {dtype}" for dtype, p in list(dtypes.items())[:2])
        raise ConfigurationError(
            f"FSDP2 reduces gradients of one dtype together, but {first} and {second}: "
            "take precision bf16-mixed, or ddp"
        )
