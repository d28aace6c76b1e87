"""The trainer options of a run: their defaults (callbacks, loggers and run folder too), and checks of their numbers.

The defaults of the command line are part of ``--print_config`` and of the ``config.yaml`` in the run folder. A
``lightning.Trainer`` that is made in Python has none of them.
"""

import math
import os
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser

from orthotrain.callbacks import RunReport
from orthotrain.errors import ConfigurationError

TRAINER: dict[str, Any] = {
    "devices": 1,
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 10,
    "check_val_every_n_epoch": None,  # val_check_interval counts the batches of the whole run
    "num_sanity_val_steps": -1,  # the value before training is that of the whole validation split
    "enable_model_summary": False,
}

VALIDATIONS = 10
"""Validations of a run whose config does not say how many."""

KINDS: dict[str, type] = {"checkpoint": Checkpoint, "report": RunReport, "progress": ProgressBar}
"""Keys of a config that name a callback of every run -> base class of the callback."""

CALLBACKS: dict[str, dict[str, Any]] = {
    "checkpoint": {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"every_n_train_steps": 500, "save_last": True, "enable_version_counter": False},
    },
    "report": {"class_path": "orthotrain.callbacks.RunReport"},
    "progress": {"class_path": "orthotrain.callbacks.RunProgress"},
}

CALLBACK_DEFAULTS = {callback["class_path"]: callback.get("init_args", {}) for callback in CALLBACKS.values()}
"""Class of a callback of every run -> arguments that every run has."""

_PARTS = ("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches", "overfit_batches")
_FROM_0 = ("min_steps", "min_epochs", "log_every_n_steps", "reload_dataloaders_every_n_epochs", "fast_dev_run")
_LEAST = {
    **dict.fromkeys(("max_steps", "max_epochs", "num_sanity_val_steps"), -1),
    **dict.fromkeys((*_FROM_0, *_PARTS), 0),
    **dict.fromkeys(("accumulate_grad_batches", "check_val_every_n_epoch", "num_nodes"), 1),
}
"""Options of the trainer -> the smallest number that a run can have."""

MOST_SEED = 2**32 - 1
MOST_NODES = 100_000
PROCESSES_A_CORE = 8
"""Most processes for each core: more of them would fill the memory and make no progress."""


def trainer_defaults(arguments: list[str]) -> dict[str, Any]:
    """Return the trainer's options of a run, whose folder is ``runs/NAME`` by the names of its configs.

    A config that only says where a run computes or logs (the folders ``trainer`` and ``logger``) is left out of the
    name.

    Args:
        arguments: The command line, in which configs are given as ``-c PATH`` or ``--config=PATH``.
    """
    folder = f"runs/{_name_of_configs(arguments)}"
    loggers = [
        _logger("TensorBoardLogger", {"save_dir": folder, "name": "", "version": ""}),
        _logger("CSVLogger", {"save_dir": folder, "name": "csv"}),
    ]
    return {**TRAINER, "default_root_dir": folder, "logger": loggers}


def _name_of_configs(arguments: list[str]) -> str:
    names = []
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        option, _, value = argument.partition("=")
        if option in ("-c", "--config"):
            names.append(Path(value or following))
    return "-".join(path.stem for path in names if path.parent.name not in ("trainer", "logger")) or "default"


def _logger(name: str, options: dict[str, str]) -> dict[str, Any]:
    return {"class_path": f"lightning.pytorch.loggers.{name}", "init_args": options}


def add_run_options(parser: LightningArgumentParser) -> None:
    """Add an option for each callback of every run, and ``--run_folder``."""
    for name, kind in KINDS.items():
        help_ = f"{kind.__name__} of every run, null for none. One in trainer.callbacks takes its place."
        parser.add_argument(f"--{name}", type=kind | None, default=CALLBACKS[name], help=help_)
        parser.callback_keys.append(name)
    parser.add_argument(
        "--imports",
        type=list[str] | None,
        help="Modules to import first, such as a file beside the config that registers a parameterization.",
    )
    parser.add_argument(
        "--base", type=str | None, help="Folder of the base model, if it has moved since the config was written."
    )
    parser.add_argument(
        "--run_folder",
        type=str | None,
        help="Folder of the run: checkpoints, logs, reports. Replaces default_root_dir of the trainer and save_dir of "
        "its loggers.",
    )


def place_validations(config: Any) -> None:
    """Spread validations evenly over a run whose config does not place them: ten, or up to twenty that end with it.

    A run by epochs has at least one validation an epoch; a part of an epoch needs data with a length, which the data
    modules of this package have.

    Args:
        config: The parsed config of a command; changed in place.
    """
    trainer = config.trainer
    steps, epochs = trainer.max_steps or -1, trainer.max_epochs or -1
    if trainer.val_check_interval is None and trainer.check_val_every_n_epoch is None:
        if steps > 0:
            most = max(1, steps // VALIDATIONS)
            between = next((n for n in range(most, most // 2, -1) if steps % n == 0), most)
            trainer.val_check_interval = between * (trainer.accumulate_grad_batches or 1)
        elif 0 < epochs < VALIDATIONS and _has_length(config.data):
            trainer.val_check_interval = 1 / math.ceil(VALIDATIONS / epochs)
    if trainer.check_val_every_n_epoch is None and isinstance(trainer.val_check_interval, float | None):
        trainer.check_val_every_n_epoch = 1  # Lightning refuses a fraction of an epoch (the default is 1.0) without it


def _has_length(data: Any) -> bool:
    ours = str(data.class_path).startswith("orthotrain.data.")
    return ours and not getattr(data.init_args, "streaming", False)


def with_run_callbacks(trainer: dict[str, Any], defaults: list[L.Callback | None]) -> dict[str, Any]:
    """Return the trainer's options with the callbacks of a run: the defaults of the command line, then its own.

    A callback of ``trainer.callbacks`` takes the place of the default of its kind: any ``Checkpoint``, ``RunReport`` or
    ``ProgressBar``. ``enable_checkpointing: false`` and ``enable_progress_bar: false`` remove the default too. Where
    a default is null and no callback replaces it, the option is false: Lightning would add a callback of its own. It
    would also add a logger of its own for ``logger: null``.

    Args:
        trainer: Options of the trainer.
        defaults: The callbacks that ``checkpoint``, ``report`` and ``progress`` name.
    """
    given = trainer["callbacks"] or []
    given = [given] if isinstance(given, L.Callback) else given
    switches = {"checkpoint": "enable_checkpointing", "progress": "enable_progress_bar"}
    options, kept = dict(trainer), []
    options["logger"] = False if trainer.get("logger", True) is None else trainer.get("logger", True)
    for (name, kind), callback in zip(KINDS.items(), defaults, strict=True):
        if any(isinstance(other, kind) for other in given):
            continue
        switch = switches.get(name, "")
        if callback is None and trainer.get(switch, True) is None:
            options[switch] = False
        if callback is not None and trainer.get(switch) is not False:
            kept.append(callback)
    return {**options, "callbacks": [*kept, *given]}


def check_checkpoint_period(checkpoint: Any) -> None:
    """Refuse a ``ModelCheckpoint`` with two periods, of which one may be the default of the command line.

    Args:
        checkpoint: The parsed option ``checkpoint``.

    Raises:
        ConfigurationError: The message names the periods, and the option that removes the default.
    """
    given = getattr(checkpoint, "init_args", None) or {}
    steps, default = given.get("every_n_train_steps"), CALLBACKS["checkpoint"]["init_args"]["every_n_train_steps"]
    for name in ("every_n_epochs", "train_time_interval"):
        if steps and given.get(name):
            of = "the default of the command line" if steps == default else "which is set too"
            raise ConfigurationError(
                f"checkpoint.{name} {given[name]}: ModelCheckpoint takes one period, and every_n_train_steps is "
                f"{steps}, {of}: add --checkpoint.every_n_train_steps null"
            )


def check_trainer_numbers(trainer: Any, seed: Any) -> None:
    """Refuse numbers that no run can have.

    Args:
        trainer: The trainer's options by name.
        seed: ``seed_everything``.

    Raises:
        ConfigurationError: The message names the first such number and its range.
    """
    for name in _PARTS:
        value = trainer.get(name)
        if isinstance(value, float) and not 0 <= value <= 1:
            _refuse(name, value, "a fraction from 0.0 to 1.0, or a whole number of batches")
    for name, least in _LEAST.items():
        value = trainer.get(name)
        if _is_number(value) and not value >= least:
            _refuse(name, value, f"at least {least}")
    nodes = trainer.get("num_nodes")
    if _is_number(nodes) and nodes > MOST_NODES:
        _refuse("num_nodes", nodes, f"at most {MOST_NODES:,}")
    devices = trainer.get("devices")
    count, most = _count(devices), max(torch.cuda.device_count(), PROCESSES_A_CORE * (os.cpu_count() or 1))
    if count > most:
        _refuse("devices", devices, f"at most {most} on this machine, because each device is a process")
    interval = trainer.get("val_check_interval")
    if _is_number(interval) and not 0 < interval <= (1 if isinstance(interval, float) else math.inf):
        _refuse("val_check_interval", interval, "a part of an epoch, above 0.0 up to 1.0, or a number of batches")
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
