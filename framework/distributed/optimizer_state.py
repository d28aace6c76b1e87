"""The state of an optimizer of sharded parameters: whole, as one device would hold it, and as the part of one rank."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from orthotrain.distributed.optimizer_8bit import WRAPPED, local_entry, sharded_like, whole_entry
from orthotrain.errors import ConfigurationError
from orthotrain.layers.sharding import whole


def whole_state(optimizer: Optimizer) -> dict[str, Any]:
    """Return an optimizer's state dict with every tensor whole and on the CPU; every rank must call this."""
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
    """Return a whole state dict with each tensor that has the shape of its parameter sharded like the parameter."""
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
    """Shard a tensor like a parameter if both have the same shape; return anything else as it is."""
    is_whole = isinstance(value, Tensor) and not isinstance(value, DTensor)
    if not is_whole or not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    return sharded_like(value, parameter)


def optimizer_key(number: int) -> str:
    """Return the name of an optimizer's tensors in a distributed checkpoint."""
    return f"optimizer_{number}"


def split_state(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split an optimizer's state dict into its tensors, by the number of the parameter, and everything else."""
    tensors: dict[str, Any] = {}
    rest: dict[Any, Any] = {}
    for number, entry in state["state"].items():
        tensors[str(number)] = {name: value for name, value in entry.items() if isinstance(value, Tensor)}
        rest[number] = {name: value for name, value in entry.items() if not isinstance(value, Tensor)}
    return tensors, {**state, "state": rest}


def joined_state(tensors: dict[str, Any], rest: dict[str, Any]) -> dict[str, Any]:
    """Undo :func:`split_state`.

    Raises:
        ConfigurationError: If ``rest`` is not the state dict of an optimizer.
    """
    entries = rest.get("state")
    if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
        raise ConfigurationError(
            "the checkpoint's state of an optimizer is no table of parameters; take an earlier one"
        )
    state = {number: {**entry, **tensors.get(str(number), {})} for number, entry in entries.items()}
    return {**rest, "state": state}


def empty_tensors(metadata: Metadata, number: int, optimizer: Optimizer) -> dict[str, Any]:
    """Return empty tensors, sharded like their parameters, for the tensors that a checkpoint holds of an optimizer.

    State that a merge had dropped before the checkpoint was written stays absent: the optimizer begins it anew.
    """
    parameters = {str(n): parameter for n, parameter, _ in _numbered(optimizer)}
    tensors: dict[str, Any] = {}
    for name, path in (metadata.planner_data or {}).items():
        entry: Any = metadata.state_dict_metadata[name]
        if path[0] != optimizer_key(number) or len(path) != 3 or not isinstance(entry, TensorStorageMetadata):
            continue
        parameter = parameters.get(path[1])
        dtype = entry.properties.dtype
        if isinstance(parameter, DTensor) and entry.size == parameter.shape:
            value: Tensor = torch.zeros_like(parameter, dtype=dtype)
        else:
            value = torch.zeros(entry.size, dtype=dtype)
        tensors.setdefault(path[1], {})[path[2]] = value
    return tensors


def _numbered(optimizer: Optimizer) -> Iterator[tuple[int, Tensor, Optimizer]]:
    """Yield each parameter with its number in the state dict and its optimizer, which may be a part of a composite."""
    number = 0
    for part in getattr(optimizer, "parts", [optimizer]):
        for group in part.param_groups:
            for parameter in group["params"]:
                yield number, parameter, part
                number += 1
