"""LightningCLI with one-line errors, self-describing checkpoints and the planner."""

import zipfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from torch.optim.lr_scheduler import LRScheduler

import orthotrain.callbacks
import orthotrain.data
import orthotrain.export
import orthotrain.schedules  # noqa: F401
from orthotrain.callbacks.sample_writer import SampleWriter
from orthotrain.config_errors import one_line
from orthotrain.errors import ConfigurationError
from orthotrain.models import ModelBuilder
from orthotrain.modules import BaseModule, OftLayers, Optimization, PoetLayers
from orthotrain.plugins import Parameterization

CONFIGURABLE = (
    BaseModule, ModelBuilder, OftLayers, Optimization, PoetLayers, Parameterization, L.LightningDataModule, L.Callback,
    L.Trainer, Logger, LRScheduler, torch.optim.Optimizer,
)  # fmt: skip
"""What a config names by class: their subclasses and arguments are what a misspelt name is compared with."""


class OneLineParser(LightningArgumentParser):
    """A parser whose complaints are a single line."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Raise what ``main`` prints: the innermost cause, not the whole tree of attempts."""
        options = [option for parser in self._parsers() for option in parser._option_string_actions]
        raise ConfigurationError(one_line(message, CONFIGURABLE, options)) from ex

    def _parsers(self) -> list["OneLineParser"]:
        commands = self._subcommands_action.choices.values() if self._subcommands_action else []
        return [self, *commands]


class OrthotrainCLI(LightningCLI):
    """fit, validate, test and predict from YAML.

    The config decides what a run is: arguments stored in a checkpoint never override it. The model's part of the config
    is stored in each checkpoint as plain values, so that export can rebuild the module from the file alone.
    """

    def __init__(self, args: list[str] | None = None, run: bool = True) -> None:
        super().__init__(
            BaseModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"callbacks": [SampleWriter()]},
            parser_class=OneLineParser,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=args,
            run=run,
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse without LightningCLI's warning about arguments that do not come from ``sys.argv``."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Check the checkpoint, but leave the config as the user wrote it.

        LightningCLI would lay the arguments stored in the checkpoint over it.
        """
        path = self.config.get(f"{self.config.get('subcommand')}.ckpt_path")
        if path is None or path in ("last", "best", "hpc"):
            return
        if not Path(path).exists():
            raise ConfigurationError(f"--ckpt_path {path!r} does not exist; give a file of a run, or last, or best")
        if Path(path).is_file() and not zipfile.is_zipfile(path):
            raise ConfigurationError(f"--ckpt_path {path!r} is no checkpoint or is truncated; take an earlier one")

    def instantiate_classes(self) -> None:
        """Build module, data and trainer; what their constructors refuse comes out as one line."""
        try:
            super().instantiate_classes()
        except ConfigurationError:
            raise
        except ValueError as error:
            if "Does not validate against" not in str(error):
                raise
            raise ConfigurationError(one_line(str(error), CONFIGURABLE)) from error

    def after_instantiate_classes(self) -> None:
        """Store the model's part of the config as its hyper-parameters."""
        config = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        if self.subcommand is not None:
            config = config[self.subcommand]
        self.model.save_hyperparameters(config["model"])


class PlanCLI(OrthotrainCLI):
    """Parses a config like fit, but builds the network from fake tensors and counts."""

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Build no trainer: a plan for eight GPUs can be made on a laptop."""

    def after_instantiate_classes(self) -> None:
        """Plan."""
        from orthotrain.plan import plan_run

        data = self.config["data"]["init_args"]
        length = data.get("sequence_length") or data.get("max_length")
        self.plan = plan_run(self.model, data["batch_size"], length, self.config["trainer"]["precision"])
