"""Whether a checkpoint has what this run restores from it: each entry of the right kind, before any of it is taken."""

import math
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from packaging.version import InvalidVersion, Version
from torch import Tensor
from torch.optim import Optimizer

from orthotrain.errors import ConfigurationError, visible

_MERGES_BY_HAND = 1000
_TABLES = ("state_dict", "loops", "callbacks")
_LISTS = ("optimizer_states", "lr_schedulers")
_NEEDED_OF_SCHEDULE = ("last_epoch", "_step_count", "base_lrs", "_last_lr")
_NEEDED_OF_GROUP = ("lr", "betas", "eps", "weight_decay", "momentum")
_LIKE_PARAMETER = (
    "exp_avg",
    "exp_avg_sq",
    "max_exp_avg_sq",
    "momentum_buffer",
    "square_avg",
    "grad_avg",
    "exp_inf",
    "momentum",
)
_COUNTS_OF_PLACE = ("epoch", "batches", "num_replicas", "windows", "batch_size", "document", "token")


def check_layout(checkpoint: dict[str, Any], origin: str) -> None:
    """Refuse a dictionary that is no checkpoint of Lightning, or whose parts are of another kind.

    Args:
        checkpoint: What a file holds.
        origin: Its path, for messages.

    Raises:
        ConfigurationError: Naming the file and the entry.
    """
    version = checkpoint.get("pytorch-lightning_version")
    try:
        Version(version)  # type: ignore[arg-type]
    except (InvalidVersion, TypeError) as error:
        raise _refused(origin, f"pytorch-lightning_version is {_short(version)}, no version") from error
    for name in ("epoch", "global_step"):
        if name in checkpoint and not is_count(checkpoint[name]):
            raise _refused(origin, f"{name} is {_short(checkpoint[name])}, which is no count")
    for name in _TABLES:
        table = checkpoint.get(name, {})
        if not isinstance(table, dict) or not all(isinstance(key, str) for key in table):
            raise _refused(origin, f"{name} is {_kind(table)} and no table by names")
    for name, value in checkpoint.get("state_dict", {}).items():
        if not isinstance(value, Tensor):
            raise _refused(origin, f"state_dict.{name} is {_kind(value)} and no tensor")
    for name in ("loops", "callbacks"):
        for key, value in checkpoint.get(name, {}).items():
            if not isinstance(value, dict):
                raise _refused(origin, f"{name}.{key} is {_kind(value)} and no table by names")
    for name in _LISTS:
        values = checkpoint.get(name, [])
        if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
            raise _refused(origin, f"{name} is {_kind(values)} and no list of tables")


def check_progress(checkpoint: dict[str, Any], trainer: L.Trainer) -> None:
    """Refuse a checkpoint whose loops or callbacks could not be restored in this run.

    Args:
        checkpoint: A checkpoint that :func:`check_layout` has passed.
        trainer: The trainer that is about to restore it.

    Raises:
        ConfigurationError: Naming the file and the entry.
    """
    origin = str(trainer.ckpt_path or "the checkpoint")
    loops = {
        TrainerFn.FITTING: "fit_loop", TrainerFn.VALIDATING: "validate_loop",
        TrainerFn.TESTING: "test_loop", TrainerFn.PREDICTING: "predict_loop",
    }  # fmt: skip
    name = loops.get(trainer.state.fn)  # type: ignore[arg-type]
    saved = checkpoint.get("loops")
    if name is not None and saved is not None:
        expected = dict(getattr(trainer, name).state_dict())
        if not checkpoint.get("global_step"):  # saved before the data was set up, as a search of Lightning's Tuner does
            expected["state_dict"] = {}
        _compare(saved.get(name), expected, f"loops.{name}", origin)
        loaders = (saved[name].get("state_dict") or {}).get("combined_loader") or []
        if not isinstance(loaders, list):
            raise _refused(origin, f"the places in the training data are {_kind(loaders)} and no list")
        for place in loaders:
            _check_place(place, origin)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        state = checkpoint.get("callbacks", {}).get(callback.state_key)
        if isinstance(callback, ModelCheckpoint) and state:
            _check_watching(state, f"callbacks.{callback.state_key}", origin)
        elif state and type(callback).__module__.startswith(("orthotrain.", "lightning.")):
            _compare(state, callback.state_dict(), f"callbacks.{callback.state_key}", origin)


def check_optimizers(checkpoint: dict[str, Any], trainer: L.Trainer) -> None:
    """Refuse a checkpoint whose optimizers or schedules are others than those of this run.

    Raises:
        ConfigurationError: Naming the file and the entry.
    """
    origin = str(trainer.ckpt_path or "the checkpoint")
    for name, own in (("optimizer_states", trainer.optimizers), ("lr_schedulers", trainer.lr_scheduler_configs)):
        if name not in checkpoint:
            raise _refused(origin, f"it has no {name}: it was saved without what training goes on from")
        grows = name == "lr_schedulers" and any(isinstance(c, StochasticWeightAveraging) for c in trainer.callbacks)  # type: ignore[attr-defined]
        if len(checkpoint[name]) < len(own) or (len(checkpoint[name]) > len(own) and not grows):
            raise _refused(origin, f"it has {len(checkpoint[name])} {name} and this run has {len(own)}")
    for number, optimizer in enumerate(trainer.optimizers):
        check_optimizer(checkpoint["optimizer_states"][number], optimizer, number, origin)
    for number, config in enumerate(trainer.lr_scheduler_configs):
        saved, expected = checkpoint["lr_schedulers"][number], config.scheduler.state_dict()
        place = f"lr_schedulers.{number}"
        if unknown := [key for key in saved if key not in expected]:
            raise _refused(
                origin, f"{place} has {_short(unknown[0])}, which a {type(config.scheduler).__name__} has not"
            )
        needed = {key: value for key, value in expected.items() if key in saved or key in _NEEDED_OF_SCHEDULE}
        _compare(saved, needed, place, origin)


def check_optimizer(saved: Any, optimizer: Optimizer, number: int, origin: str) -> None:
    """Refuse the state of another optimizer than this one.

    Args:
        saved: What a checkpoint has of it.
        optimizer: The optimizer.
        number: Which of the optimizers it is.
        origin: Where it comes from, for messages.

    Raises:
        ConfigurationError: Naming the entry.
    """
    place = f"optimizer_states.{number}"
    groups, state = (saved.get(key) if isinstance(saved, dict) else None for key in ("param_groups", "state"))
    if not isinstance(groups, list) or not isinstance(state, dict) or not all(isinstance(g, dict) for g in groups):
        raise _refused(origin, f"{place} has no param_groups and state as an optimizer has them")
    own = optimizer.param_groups
    if len(groups) != len(own):
        raise _refused(origin, f"{place} has {len(groups)} groups of parameters and this run has {len(own)}")
    parameters: dict[int, Tensor] = {}
    for at, (group, here) in enumerate(zip(groups, own, strict=True)):
        numbers = group.get("params")
        if not isinstance(numbers, list) or len(numbers) != len(here["params"]) or not all(map(is_count, numbers)):
            raise _refused(origin, f"{place}.param_groups.{at} is not of the {len(here['params'])} parameters here")
        parameters.update(zip(numbers, here["params"], strict=True))
        common = {k: v for k, v in here.items() if k != "params" and (k in group or k in _NEEDED_OF_GROUP)}
        # an option may be a whole number here and have been a fraction there
        common = {k: float(v) if type(v) is int else v for k, v in common.items()}
        _compare(group, common, f"{place}.param_groups.{at}", origin)
    owners = {id(p): part for part in getattr(optimizer, "parts", [optimizer]) for p in parameters_of(part)}
    for key, entry in state.items():
        if key not in parameters or not isinstance(entry, dict):
            raise _refused(origin, f"{place}.state.{_short(key)} is of no parameter of this run")
        _check_entry(entry, parameters[key], owners[id(parameters[key])], f"{place}.state.{key}", origin)


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters of an optimizer in the order of its groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def check_merges(state: dict[str, Any], steps: Any) -> None:
    """Refuse layers that were merged far more often than their run has taken steps: each merge is looked up again.

    Args:
        state: The network's part of a checkpoint.
        steps: Optimizer steps of its run, None if that is not known.

    Raises:
        ConfigurationError: Naming the layer.
    """
    counts = ("merge_count", "fold_count")
    for name in [name for name in state if name.endswith(counts)] if is_count(steps) else ():
        if state[name].numel() == 1 and int(state[name]) > steps + _MERGES_BY_HAND:
            raise ConfigurationError(f"{name} is {int(state[name]):,} in a checkpoint of optimizer step {steps:,}")


def is_count(value: Any) -> bool:
    """Tell whether a value is an integer that counts something."""
    return type(value) is int and 0 <= value < 1 << 62


def _check_entry(entry: dict[Any, Any], parameter: Tensor, owner: Optimizer, place: str, origin: str) -> None:
    """Refuse moments that are not those of their parameter, and a step that is none."""
    needed = ("step", "exp_avg", "exp_avg_sq") if entry and type(owner) in (torch.optim.Adam, torch.optim.AdamW) else ()
    if missing := [name for name in needed if name not in entry]:
        raise _refused(origin, f"{place} has no {missing[0]}")
    if "step" in entry and (not _is_number(entry["step"]) or not 0 <= float(entry["step"]) < 1 << 62):
        raise _refused(origin, f"{place}.step is {_short(entry['step'])}, which is no count")
    plain = type(owner).__module__.startswith(("torch.optim", "orthotrain.optimizers.lie"))
    for name in _LIKE_PARAMETER if plain else ():
        value, shape = entry.get(name), parameter.shape
        if value is None:
            continue
        fits = isinstance(value, Tensor) and value.shape == shape and value.is_floating_point()
        if not fits or _is_packed(value):
            raise _refused(origin, f"{place}.{name} is {_kind(value)}, its parameter has the shape {tuple(shape)}")


def _check_watching(state: dict[str, Any], place: str, origin: str) -> None:
    """Refuse the state of a ``ModelCheckpoint`` with paths that are no strings or scores that are no numbers."""
    for name in ("best_model_path", "last_model_path", "kth_best_model_path"):
        if not isinstance(state.get(name, ""), str):
            raise _refused(origin, f"{place}.{name} is {_kind(state[name])} and no path")
    if "best_model_path" not in state or "best_model_score" not in state:
        raise _refused(origin, f"{place} has no best_model_path and best_model_score")
    scores = state.get("best_k_models", {})
    if not isinstance(scores, dict) or not all(isinstance(path, str) for path in scores):
        raise _refused(origin, f"{place}.best_k_models is {_kind(scores)} and no table of paths")
    named = {name: state.get(name) for name in ("best_model_score", "current_score", "kth_value")}
    for name, score in {**scores, **named}.items():
        if score is not None and not _is_number(score):
            raise _refused(origin, f"{place}: the score of {_short(name)} is {_kind(score)} and no number")


def _check_place(place: Any, origin: str) -> None:
    """Refuse a place in the training data that is none."""
    if place is not None and not isinstance(place, dict):
        raise _refused(origin, f"the place in the training data is {_kind(place)} and no table by names")
    counts: dict[str, Any] = place or {}
    for name in _COUNTS_OF_PLACE:
        if name in counts and not is_count(counts[name]):
            raise _refused(origin, f"the place in the training data has {name} {_short(counts[name])}, no count")


def _compare(saved: Any, expected: Any, place: str, origin: str) -> None:
    """Refuse a value of another kind than the one that this run has in its place."""
    if isinstance(expected, dict):
        if not isinstance(saved, dict):
            raise _refused(origin, f"{place} is {_kind(saved)} and no table by names")
        for name, value in expected.items():
            if name not in saved:
                raise _refused(origin, f"{place} has no {name}")
            _compare(saved[name], value, f"{place}.{name}", origin)
    elif isinstance(expected, list | tuple):
        same = isinstance(saved, list | tuple) and (not expected or len(saved) == len(expected))
        if not same:
            raise _refused(origin, f"{place} is {_kind(saved)} and no list of {len(expected)}")
        for number, (value, own) in enumerate(zip(saved, expected, strict=False)):
            _compare(value, own, f"{place}.{number}", origin)
    elif not _is_like(saved, expected):
        raise _refused(origin, f"{place} is {_short(saved)} where {_short(expected)} stands at the start")


def _is_like(saved: Any, expected: Any) -> bool:
    """Tell whether a plain value may stand where another one stands."""
    if expected is None:
        return True
    if isinstance(expected, bool):
        return isinstance(saved, bool)
    if isinstance(expected, int):
        return type(saved) is int and abs(saved) < 1 << 62 and (saved >= 0 or expected < 0)
    if isinstance(expected, float):
        return _is_number(saved) and (not math.isfinite(expected) or math.isfinite(float(saved)))
    if isinstance(expected, Tensor):
        return (
            _is_number(saved) if expected.numel() == 1 else isinstance(saved, Tensor) and saved.shape == expected.shape
        )
    return not isinstance(expected, str) or saved is None or isinstance(saved, str)


def _is_packed(value: Tensor) -> bool:
    """Tell whether a tensor has floating-point numbers of 8 bits or less, with which PyTorch computes nothing."""
    return value.is_floating_point() and value.dtype.itemsize < 2


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex() and not _is_packed(value)
    return isinstance(value, float) or (type(value) is int and abs(value) < 1 << 62)


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} of {value.dtype}"
    return "missing" if value is None else f"a {type(value).__name__}"


def _short(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 1 << 128:
        return "an integer of many digits"
    return repr(value)[:60] if isinstance(value, str | int | float | None) else _kind(value)


def _refused(origin: str, what: str) -> ConfigurationError:
    return ConfigurationError(f"checkpoint {origin!r} cannot be restored: {visible(what)}; take an earlier one")
