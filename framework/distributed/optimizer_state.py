"""The state of optimizers of sharded parameters, as one device would hold it and as every rank does."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from orthotrain.distributed.optimizer_8bit import WRAPPED, local_entry, whole_entry
from orthotrain.errors import ConfigurationError
from orthotrain.layers.sharding import whole


def whole_state(optimizer: Optimizer) -> dict[str, Any]:
    """Return an optimizer's state dict with every tensor whole and on the CPU; a collective."""
    document = optimizer.state_dict()
    state = {}
    for number, parameter, part in _numbered(optimizer):
        entry = document["state"].get(number)
        if entry is None:
            continue
        if WRAPPED in entry and isinstance(parameter, DTensor):
            entry = whole_entry(entry, parameter, part)
        state[number] = {name: whole(v).cpu() if isinstance(v, Tensor) else v for name, v in entry.items()}
    return {**document, "state": state}


def sharded_state(saved: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Return an optimizer's whole state dict with every tensor that is shaped like its parameter sharded like it."""
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    sharded: dict[Any, dict[str, Any]] = {}
    for number, (_, parameter, part) in zip(numbers, _numbered(optimizer), strict=True):
        entry = saved["state"].get(number)
        if entry is None:
            continue
        if WRAPPED in entry and isinstance(parameter, DTensor):
            entry = local_entry(entry, parameter, part)
        sharded[number] = {n: like_parameter(value, parameter) for n, value in entry.items()}
    return {**saved, "state": sharded}


def like_parameter(value: Any, parameter: Tensor) -> Any:
    """Return a tensor shaped like a sharded parameter sharded like it, anything else as it is."""
    if not isinstance(value, Tensor) or isinstance(value, DTensor) or not isinstance(parameter, DTensor):
        return value
    if value.shape != parameter.shape:
        return value
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def optimizer_key(number: int) -> str:
    """Return the name under which the tensors of an optimizer lie in a distributed checkpoint."""
    return f"optimizer_{number}"


def split_state(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split an optimizer's state dict into its tensors, by the number of the parameter, and all the rest."""
    tensors: dict[str, Any] = {}
    rest: dict[Any, Any] = {}
    for number, entry in state["state"].items():
        tensors[str(number)] = {name: value for name, value in entry.items() if isinstance(value, Tensor)}
        rest[number] = {name: value for name, value in entry.items() if not isinstance(value, Tensor)}
    return tensors, {**state, "state": rest}


def joined_state(tensors: dict[str, Any], rest: dict[str, Any]) -> dict[str, Any]:
    """Undo :func:`split_state`.

    Raises:
        ConfigurationError: If the rest is of no optimizer.
    """
    entries = rest.get("state")
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise ConfigurationError(
            "the checkpoint's state of an optimizer is no table of parameters; take an earlier one"
        )
    state = {number: {**entry, **tensors.get(str(number), {})} for number, entry in entries.items()}
    return {**rest, "state": state}


def empty_tensors(metadata: Metadata, number: int, optimizer: Optimizer) -> dict[str, Any]:
    """Return tensors, sharded like their parameters, for what a distributed checkpoint holds of an optimizer.

    What it does not hold, because a merge had just dropped it, is not made: the optimizer begins it anew.
    """
    parameters = {str(n): parameter for n, parameter, _ in _numbered(optimizer)}
    tensors: dict[str, Any] = {}
    for name, place in (metadata.planner_data or {}).items():
        entry: Any = metadata.state_dict_metadata[name]
        if place[0] != optimizer_key(number) or len(place) != 3 or not isinstance(entry, TensorStorageMetadata):
            continue
        parameter = parameters.get(place[1])
        dtype = entry.properties.dtype
        if isinstance(parameter, DTensor) and entry.size == parameter.shape:
            value: Tensor = torch.zeros_like(parameter, dtype=dtype)
        else:
            value = torch.zeros(entry.size, dtype=dtype)
        tensors.setdefault(place[1], {})[place[2]] = value
    return tensors


def _numbered(optimizer: Optimizer) -> Iterator[tuple[int, Tensor, Optimizer]]:
    """Yield the parameters with their numbers in the state dict and the optimizer, or part of one, that has them."""
    number = 0
    for part in getattr(optimizer, "parts", [optimizer]):
        for group in part.param_groups:
            for parameter in group["params"]:
                yield number, parameter, part
                number += 1
