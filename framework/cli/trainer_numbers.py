"""Checks of the trainer's numbers that Lightning would accept although no run can have them."""

import math
import os
from typing import Any

import torch

from orthotrain.errors import ConfigurationError

_LEAST = {
    "accumulate_grad_batches": 1,
    "max_steps": -1,
    "max_epochs": -1,
    "min_steps": 0,
    "min_epochs": 0,
    "check_val_every_n_epoch": 1,
    "log_every_n_steps": 0,
    "num_sanity_val_steps": -1,
    "num_nodes": 1,
    "reload_dataloaders_every_n_epochs": 0,
    "fast_dev_run": 0,
}
_SHARES = ("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches", "overfit_batches")
MOST_SEED = 2**32 - 1
MOST_NODES = 100_000
PROCESSES_A_CORE = 8
"""Most processes for each core: more of them would fill the memory and make no progress."""


def check_trainer_numbers(trainer: Any, seed: Any) -> None:
    """Refuse numbers that no run can have.

    Args:
        trainer: The trainer's options by name.
        seed: ``seed_everything``.

    Raises:
        ConfigurationError: The message names the first such number and its range.
    """
    for name, least in _LEAST.items():
        value = trainer.get(name)
        if _is_number(value) and not value >= least:
            _refuse(name, value, f"at least {least}")
    for name in _SHARES:
        value = trainer.get(name)
        if isinstance(value, float) and not 0 <= value <= 1:
            _refuse(name, value, "a fraction from 0.0 to 1.0, or a whole number of batches")
        if _is_number(value) and not value >= 0:
            _refuse(name, value, "at least 0")
    nodes = trainer.get("num_nodes")
    if _is_number(nodes) and nodes > MOST_NODES:
        _refuse("num_nodes", nodes, f"at most {MOST_NODES:,}")
    devices = trainer.get("devices")
    count, most = _count(devices), max(torch.cuda.device_count(), PROCESSES_A_CORE * (os.cpu_count() or 1))
    if count > most:
        _refuse("devices", devices, f"at most {most} on this machine, because each device is a process")
    interval = trainer.get("val_check_interval")
    if isinstance(interval, float) and not 0 < interval <= 1:
        _refuse("val_check_interval", interval, "a fraction of an epoch up to 1.0, above 0.0, or a number of batches")
    if _is_number(interval) and not interval > 0:
        _refuse("val_check_interval", interval, "at least 1 batch, or a fraction of an epoch")
    clip = trainer.get("gradient_clip_val")
    if _is_number(clip) and not (clip >= 0 and math.isfinite(clip)):
        _refuse("gradient_clip_val", clip, "a finite number, at least 0")
    if _is_number(seed) and not 0 <= seed <= MOST_SEED:
        raise ConfigurationError(f"seed_everything {seed}: must be from 0 to {MOST_SEED}")


def _count(devices: Any) -> float:
    """Return the number of devices that Lightning reads from a number, a list, or text with either of them."""
    if isinstance(devices, str):
        if "," in devices:
            return len([part for part in devices.split(",") if part.strip()])
        try:
            return float(devices)  # as int, but with any number of digits
        except ValueError:
            return 0
    if isinstance(devices, list | tuple):
        return len(devices)
    return devices if _is_number(devices) else 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _refuse(name: str, value: Any, wanted: str) -> None:
    raise ConfigurationError(f"trainer.{name} {value!s:.40}: must be {wanted}")
