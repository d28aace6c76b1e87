"""Checks that a checkpoint has what this run restores from it. They run before anything is restored.

Lightning restores the values of a file without a check: a value of a wrong type raises an error far away, or no error.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from packaging.version import InvalidVersion, Version
from torch import Tensor
from torch.optim import Optimizer

from orthotrain.checkpoints.stored_values import is_8bit_float, is_named, is_number, kind_of, short
from orthotrain.errors import ConfigurationError, visible
from orthotrain.files.pickle_classes import is_count

_MERGES_BY_HAND = 1000
_NEEDED_OF_SCHEDULE = ("last_epoch", "_step_count", "base_lrs", "_last_lr")
_NEEDED_OF_GROUP = ("lr", "betas", "eps", "weight_decay", "momentum")
_SHAPED_LIKE_PARAMETER = (
    *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg", "exp_inf", "momentum"),
)
_COUNTS_OF_LOADER = ("epoch", "batches", "num_replicas", "windows", "batch_size", "document", "token")


class _Unfit(ValueError):
    """A value that this run cannot restore."""


@contextmanager
def _naming_checkpoint(origin: str) -> Iterator[None]:
    """Name the checkpoint in the error of a value that cannot be restored."""
    try:
        yield
    except _Unfit as error:
        raise ConfigurationError(
            f"checkpoint {origin!r} cannot be restored: {visible(str(error))}; take an earlier one"
        ) from error


def _require(condition: object, message: str) -> None:
    if not condition:
        raise _Unfit(message)


def check_layout(checkpoint: dict[str, Any], origin: str) -> None:
    """Refuse a dictionary that is not a Lightning checkpoint, or that has parts of a wrong type.

    Args:
        checkpoint: Contents of a file.
        origin: Path of the file, for messages.

    Raises:
        ConfigurationError: The message names the file and the entry.
    """
    with _naming_checkpoint(origin):
        version = checkpoint.get("pytorch-lightning_version")
        try:
            Version(version)  # type: ignore[arg-type]
        except (InvalidVersion, TypeError) as error:
            raise _Unfit(f"pytorch-lightning_version is {short(version)}, not a version") from error
        for name in ("epoch", "global_step"):
            _require(is_count(checkpoint.get(name, 0)), f"{name} is {short(checkpoint.get(name))}, not a count")
        for name in ("state_dict", "loops", "callbacks"):
            values = checkpoint.get(name, {})
            _require(is_named(values), f"{name} is {kind_of(values)}, not a dictionary with strings as keys")
        for name, value in checkpoint.get("state_dict", {}).items():
            _require(isinstance(value, Tensor), f"state_dict.{name} is {kind_of(value)}, not a tensor")
        for name in ("loops", "callbacks"):
            for key, value in checkpoint.get(name, {}).items():
                _require(isinstance(value, dict), f"{name}.{key} is {kind_of(value)}, not a dictionary")
        for name in ("optimizer_states", "lr_schedulers"):
            values = checkpoint.get(name, [])
            dictionaries = isinstance(values, list) and all(isinstance(value, dict) for value in values)
            _require(dictionaries, f"{name} is {kind_of(values)}, not a list of dictionaries")


def check_progress(checkpoint: dict[str, Any], trainer: L.Trainer) -> None:
    """Refuse a checkpoint with loops or callbacks that this run cannot restore.

    Args:
        checkpoint: A checkpoint that :func:`check_layout` has accepted.
        trainer: The trainer that is about to restore the checkpoint.

    Raises:
        ConfigurationError: The message names the file and the entry.
    """
    with _naming_checkpoint(str(trainer.ckpt_path or "the checkpoint")):
        _check_loops(checkpoint, trainer)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            state, position = checkpoint.get("callbacks", {}).get(callback.state_key), f"callbacks.{callback.state_key}"
            if isinstance(callback, ModelCheckpoint) and state:
                _check_model_checkpoint(state, position)
            elif state and type(callback).__module__.startswith(("orthotrain.", "lightning.")):
                _compare(state, callback.state_dict(), position)


def _check_loops(checkpoint: dict[str, Any], trainer: L.Trainer) -> None:
    saved = checkpoint.get("loops")
    if trainer.state.fn is None or saved is None:
        return
    name = f"{trainer.state.fn.value}_loop"
    expected = dict(getattr(trainer, name).state_dict())
    if not checkpoint.get("global_step"):  # Lightning's Tuner saves a checkpoint before the data is set up
        expected["state_dict"] = {}
    _compare(saved.get(name), expected, f"loops.{name}")
    loaders = (saved[name].get("state_dict") or {}).get("combined_loader") or []
    _require(isinstance(loaders, list), f"the state of the data loaders is {kind_of(loaders)}, not a list")
    for state in loaders:
        _require(isinstance(state, dict | None), f"the state of a data loader is {kind_of(state)}, not a dictionary")
        for key in _COUNTS_OF_LOADER:
            value = (state or {}).get(key, 0)
            _require(is_count(value), f"the state of a data loader has {key} {short(value)}, not a count")


def check_optimizers(checkpoint: dict[str, Any], trainer: L.Trainer) -> None:
    """Refuse a checkpoint whose optimizers or learning-rate schedules differ from this run.

    Raises:
        ConfigurationError: The message names the file and the entry.
    """
    origin = str(trainer.ckpt_path or "the checkpoint")
    with _naming_checkpoint(origin):
        for name, own in (("optimizer_states", trainer.optimizers), ("lr_schedulers", trainer.lr_scheduler_configs)):
            _require(name in checkpoint, f"it has no {name}, which training needs to go on")
            saved, here = len(checkpoint[name]), len(own)
            grows = name == "lr_schedulers" and any(
                isinstance(callback, StochasticWeightAveraging)
                for callback in trainer.callbacks  # type: ignore[attr-defined]
            )
            _require(saved == here or (saved > here and grows), f"it has {saved} {name} and this run has {here}")
        for number, optimizer in enumerate(trainer.optimizers):
            check_optimizer(checkpoint["optimizer_states"][number], optimizer, number, origin)
        for number, config in enumerate(trainer.lr_scheduler_configs):
            state, expected = checkpoint["lr_schedulers"][number], config.scheduler.state_dict()
            position, kind = f"lr_schedulers.{number}", type(config.scheduler).__name__
            for key in state:
                _require(key in expected, f"{position} has {short(key)}, which a {kind} does not have")
            needed = {key: value for key, value in expected.items() if key in state or key in _NEEDED_OF_SCHEDULE}
            _compare(state, needed, position)


def check_optimizer(saved: Any, optimizer: Optimizer, number: int, origin: str) -> None:
    """Refuse the state of another optimizer.

    Args:
        saved: The state of an optimizer in a checkpoint.
        optimizer: The optimizer of this run.
        number: Index of the optimizer in the run.
        origin: Path of the checkpoint, for messages.

    Raises:
        ConfigurationError: The message names the entry.
    """
    with _naming_checkpoint(origin):
        position = f"optimizer_states.{number}"
        saved = saved if isinstance(saved, dict) else {}
        groups, state = saved.get("param_groups"), saved.get("state")
        whole = isinstance(groups, list) and isinstance(state, dict) and all(isinstance(g, dict) for g in groups)
        _require(whole, f"{position} does not have the param_groups and state of an optimizer")
        parameters = _parameters_by_number(groups, optimizer, position)
        owners = {id(p): part for part in getattr(optimizer, "parts", [optimizer]) for p in parameters_of(part)}
        for key, entry in state.items():
            known = key in parameters and isinstance(entry, dict)
            _require(known, f"{position}.state.{short(key)} is of no parameter of this run")
            _check_moments(entry, parameters[key], owners[id(parameters[key])], f"{position}.state.{key}")


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters of an optimizer in the order of its groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def check_merges(state: dict[str, Any], steps: Any) -> None:
    """Refuse layers with far more merges than steps of their run: a layer replays all its merges when it is loaded.

    Args:
        state: The state dict of the network in a checkpoint.
        steps: Number of optimizer steps of its run; None if unknown.

    Raises:
        ConfigurationError: The message names the layer.
    """
    counts = ("merge_count", "fold_count")
    for name in [name for name in state if name.endswith(counts)] if is_count(steps) else ():
        if state[name].numel() == 1 and int(state[name]) > steps + _MERGES_BY_HAND:
            raise ConfigurationError(f"{name} is {int(state[name]):,} in a checkpoint of optimizer step {steps:,}")


def _parameters_by_number(groups: list[dict[str, Any]], optimizer: Optimizer, position: str) -> dict[int, Tensor]:
    """Check the saved groups of an optimizer, and return its parameters by the numbers that the groups give them."""
    own = optimizer.param_groups
    _require(len(groups) == len(own), f"{position} has {len(groups)} parameter groups and this run has {len(own)}")
    parameters: dict[int, Tensor] = {}
    for index, (group, here) in enumerate(zip(groups, own, strict=True)):
        numbers, count = group.get("params"), len(here["params"])
        fits = isinstance(numbers, list) and len(numbers) == count and all(map(is_count, numbers))
        _require(fits, f"{position}.param_groups.{index} does not have the {count} parameters of this run")
        parameters.update(zip(numbers, here["params"], strict=True))  # type: ignore[arg-type]
        common = {k: v for k, v in here.items() if k != "params" and (k in group or k in _NEEDED_OF_GROUP)}
        # an option may be an integer in this run and a float in the saved run
        common = {k: float(v) if type(v) is int else v for k, v in common.items()}
        _compare(group, common, f"{position}.param_groups.{index}")
    return parameters


def _check_moments(entry: dict[Any, Any], parameter: Tensor, owner: Optimizer, position: str) -> None:
    """Refuse moments that do not fit their parameter, and a step that is not a count."""
    needed = ("step", "exp_avg", "exp_avg_sq") if entry and type(owner) in (torch.optim.Adam, torch.optim.AdamW) else ()
    for name in needed:
        _require(name in entry, f"{position} has no {name}")
    step = entry.get("step", 0)
    _require(is_number(step) and 0 <= float(step) < 1 << 62, f"{position}.step is {short(step)}, not a count")
    if not type(owner).__module__.startswith(("torch.optim", "orthotrain.optimizers.lie")):
        return
    for name in _SHAPED_LIKE_PARAMETER:
        value, shape = entry.get(name), parameter.shape
        fits = isinstance(value, Tensor) and value.shape == shape and value.is_floating_point()
        fits = value is None or (fits and not is_8bit_float(value))
        _require(fits, f"{position}.{name} is {kind_of(value)}, its parameter has the shape {tuple(shape)}")


def _check_model_checkpoint(state: dict[str, Any], position: str) -> None:
    """Refuse the state of a ``ModelCheckpoint`` with paths that are not strings or scores that are not numbers."""
    for name in ("best_model_path", "last_model_path", "kth_best_model_path"):
        _require(isinstance(state.get(name, ""), str), f"{position}.{name} is {kind_of(state.get(name))}, not a path")
    for name in ("best_model_path", "best_model_score"):
        _require(name in state, f"{position} has no {name}")
    scores = state.get("best_k_models", {})
    _require(is_named(scores), f"{position}.best_k_models is {kind_of(scores)}, not a dictionary with paths as keys")
    named = {name: state.get(name) for name in ("best_model_score", "current_score", "kth_value")}
    for name, score in {**scores, **named}.items():
        number = score is None or is_number(score)
        _require(number, f"{position}: the score of {short(name)} is {kind_of(score)}, not a number")


def _compare(saved: Any, expected: Any, position: str) -> None:
    """Refuse a saved value whose type, or whose length, differs from the value of this run at the same position."""
    if isinstance(expected, dict):
        _require(isinstance(saved, dict), f"{position} is {kind_of(saved)}, not a dictionary")
        for name, value in expected.items():
            _require(name in saved, f"{position} has no {name}")
            _compare(saved[name], value, f"{position}.{name}")
    elif isinstance(expected, list | tuple):
        fits = isinstance(saved, list | tuple) and (not expected or len(saved) == len(expected))
        _require(fits, f"{position} is {kind_of(saved)}, not a list of {len(expected)}")
        for number, (value, own) in enumerate(zip(saved, expected, strict=False)):
            _compare(value, own, f"{position}.{number}")
    else:
        _require(_is_like(saved, expected), f"{position} is {short(saved)}, a new run starts with {short(expected)}")


def _is_like(saved: Any, expected: Any) -> bool:
    """Tell whether a saved value may replace a value of this run."""
    if expected is None:
        return True
    if isinstance(expected, bool):
        return isinstance(saved, bool)
    if isinstance(expected, int):
        return type(saved) is int and abs(saved) < 1 << 62 and (saved >= 0 or expected < 0)
    if isinstance(expected, float):
        return is_number(saved) and (not math.isfinite(expected) or math.isfinite(float(saved)))
    if isinstance(expected, Tensor):
        same = isinstance(saved, Tensor) and saved.shape == expected.shape
        return is_number(saved) if expected.numel() == 1 else same
    return not isinstance(expected, str) or saved is None or isinstance(saved, str)
