"""The paths of a run: ``~`` in them, a base model that has moved, and one folder for everything that is written."""

import os
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from orthotrain.errors import ConfigurationError
from orthotrain.export.checkpoint_model import BASE_KEYS
from orthotrain.files.paths import local_path

_PATHS = ("path", "base", "dir", "folder", "file", "filename", "name", "tokenizer")
"""Ends of the keys of paths. A model and its tokenizer are named by a folder or by a name of the hub."""


def expand_home(value: Any, key: str = "") -> Any:
    """Expand ``~`` in the paths of a config, known by the ends of their keys; a Namespace is changed in place.

    Raises:
        ConfigurationError: There is no such user.
    """
    if isinstance(value, Namespace | dict):
        for name, item in list(value.items() if isinstance(value, dict) else vars(value).items()):
            value[name] = expand_home(item, name)
    elif isinstance(value, list):
        return [expand_home(item, key) for item in value]
    elif isinstance(value, str) and value.startswith("~") and key.endswith(_PATHS):
        return str(local_path(value, key))
    return value


def move_base(config: Any) -> None:
    """Start from the base model in the folder ``base``, for the model and for a tokenizer that has lain beside it.

    Args:
        config: The parsed config of a command; changed in place.

    Raises:
        ConfigurationError: The run has no base model.
    """
    if config.get("base") is None:
        return
    builder = config.model.init_args.get("model")
    arguments: Any = (builder.get("init_args") if isinstance(builder, Namespace) else None) or {}
    key = next((key for key in BASE_KEYS if key in arguments), None)
    if key is None:
        raise ConfigurationError(f"--base {config.base!r}: the config has no base model; leave --base out")
    data = config.data.get("init_args") or {}
    if data.get("tokenizer") == arguments[key]:
        data["tokenizer"] = config.base
    arguments[key], config.base = config.base, None  # the config in the run folder names the new place


def logger_arguments(folder: str) -> dict[str, dict[str, str]]:
    """Return the arguments of loggers that write to a run folder: class name -> arguments.

    Args:
        folder: The folder of :func:`trainer_defaults`, in whose place :func:`place_run` puts the folder of the run.
    """
    numbered = {"save_dir": folder, "name": "", "version": ""}  # a numbered version is a new folder at each start
    mlflow = {"save_dir": folder}
    if "MLFLOW_TRACKING_URI" not in os.environ:  # MLflow 3 refuses its old store of plain files
        mlflow |= {"tracking_uri": f"sqlite:///{folder}/mlflow.db", "artifact_location": f"{folder}/artifacts"}
    own = {"WandbLogger": {"save_dir": folder}, "MLFlowLogger": mlflow}
    return {"CSVLogger": numbered, "TensorBoardLogger": numbered, **own}


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
        options, name = getattr(logger, "init_args", {}), getattr(logger, "class_path", "").rpartition(".")[2]
        if config.run_folder and "save_dir" in options:
            options["save_dir"] = config.run_folder
        for key, value in logger_arguments(default_folder).get(name, {}).items():
            if options.get(key) == value:
                options[key] = value.replace(default_folder, str(trainer.default_root_dir or default_folder))
