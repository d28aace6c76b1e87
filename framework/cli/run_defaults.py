"""What every run of the command line has unless its config says otherwise: trainer options, callbacks, loggers, folder.

All of it is part of ``--print_config`` and of the ``config.yaml`` in the run folder. A ``lightning.Trainer`` that is
made in Python has none of it.
"""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser

from orthotrain.callbacks import RunReport
from orthotrain.files.paths import local_path

TRAINER: dict[str, Any] = {
    "devices": 1,
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 10,
    "check_val_every_n_epoch": None,  # val_check_interval counts the batches of the whole run
    "enable_model_summary": False,
}

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


def trainer_defaults(arguments: list[str]) -> dict[str, Any]:
    """Return the trainer's options of a run, whose folder is ``runs/NAME`` by the names of its configs.

    A config that only says where a run computes (the folder ``trainer``) is left out of the name.

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
        elif option.startswith("-c"):  # argparse takes -cPATH too
            names.append(Path(argument.removeprefix("-c")))
    return "-".join(path.stem for path in names if path.parent.name != "trainer") or "default"


def _logger(name: str, options: dict[str, str]) -> dict[str, Any]:
    return {"class_path": f"lightning.pytorch.loggers.{name}", "init_args": options}


def add_run_options(parser: LightningArgumentParser) -> None:
    """Add an option for each callback of every run, and ``--run_folder``."""
    for name, kind in KINDS.items():
        help_ = f"{kind.__name__} of every run, null for none. One in trainer.callbacks takes its place."
        parser.add_argument(f"--{name}", type=kind | None, default=CALLBACKS[name], help=help_)
        parser.callback_keys.append(name)
    parser.add_argument(
        "--run_folder",
        type=str | None,
        help="Folder of the run: checkpoints, logs, reports. Replaces default_root_dir of the trainer and save_dir of "
        "its loggers.",
    )


def place_run(config: Any, default_folder: str) -> None:
    """Put all files of a run into one folder: ``run_folder``, or the trainer's ``default_root_dir``.

    Args:
        config: The parsed config of a command; changed in place.
        default_folder: The folder of :func:`trainer_defaults`, which loggers still have where the config names another.

    Raises:
        ConfigurationError: If no folder can have the path.
    """
    trainer = config.trainer
    for name, path in (("run_folder", config.run_folder), ("default_root_dir", trainer.default_root_dir)):
        if path is not None:
            local_path(path, name)
    trainer.default_root_dir = config.run_folder or trainer.default_root_dir
    saving = getattr(config.checkpoint, "init_args", {})
    if "dirpath" in saving and saving["dirpath"] is None:  # the folder of a logger changes with each version
        saving["dirpath"] = str(Path(trainer.default_root_dir or default_folder) / "checkpoints")
    for logger in trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]:
        options = getattr(logger, "init_args", {})
        if "save_dir" in options and (config.run_folder or options["save_dir"] == default_folder):
            options["save_dir"] = trainer.default_root_dir or default_folder
    if trainer.check_val_every_n_epoch is None and isinstance(trainer.val_check_interval, float | None):
        trainer.check_val_every_n_epoch = 1  # Lightning refuses a fraction of an epoch (the default is 1.0) without it


def run_callbacks(trainer: dict[str, Any], defaults: list[L.Callback | None]) -> list[L.Callback]:
    """Return the callbacks of a run: the defaults of the command line, then ``trainer.callbacks``.

    A callback of ``trainer.callbacks`` takes the place of the default of its kind: any ``Checkpoint``, ``RunReport`` or
    ``ProgressBar``. ``enable_checkpointing: false`` and ``enable_progress_bar: false`` remove the default too. Without
    any callback of a kind these options become false in ``trainer``, where Lightning would add a callback of its own.

    Args:
        trainer: Options of the trainer.
        defaults: The callbacks that ``checkpoint``, ``report`` and ``progress`` name.
    """
    given = trainer["callbacks"] or []
    given = [given] if isinstance(given, L.Callback) else given
    switches = {"checkpoint": "enable_checkpointing", "progress": "enable_progress_bar"}
    kept = []
    for (name, kind), callback in zip(KINDS.items(), defaults, strict=True):
        if any(isinstance(other, kind) for other in given):
            continue
        if callback is None and name in switches and trainer[switches[name]] is None:
            trainer[switches[name]] = False
        if callback is not None and trainer.get(switches.get(name)) is not False:
            kept.append(callback)
    return [*kept, *given]
