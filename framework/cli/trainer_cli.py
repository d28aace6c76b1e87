"""LightningCLI with this package's defaults, checks before a run, and the command ``plan``."""

import contextlib
import hashlib
import re
import signal
import warnings
from collections.abc import Iterator
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from orthotrain.callbacks.sample_writer import SampleWriter
from orthotrain.checkpoints.run_folder import run_folder, written_folders
from orthotrain.cli.ckpt_path import check_path, checkpoint_of, naming_checkpoint
from orthotrain.cli.memory_advice import check_fits, naming_memory
from orthotrain.cli.overlay import overlaid_values
from orthotrain.cli.own_modules import import_modules
from orthotrain.cli.parser import CONFIGURABLE, OneLineParser
from orthotrain.cli.plan import batch_shape, plan_run
from orthotrain.cli.run_lock import holding
from orthotrain.cli.run_paths import expand_home, logger_arguments, move_base, place_run
from orthotrain.cli.trainer_options import (
    CALLBACK_DEFAULTS,
    add_run_options,
    check_checkpoint_period,
    check_trainer_numbers,
    place_validations,
    trainer_defaults,
    with_run_callbacks,
)
from orthotrain.console.config_errors import one_line
from orthotrain.console.termination import check
from orthotrain.devices.accelerators import check_device
from orthotrain.errors import ConfigurationError
from orthotrain.files.atomic_writes import write_text
from orthotrain.kernels.dispatch import chosen
from orthotrain.layers.checks import check_kernels
from orthotrain.models import CausalLM, check_vocabulary
from orthotrain.modules import BaseModule


class OrthotrainCLI(LightningCLI):
    """fit, validate, test and predict from YAML.

    The config alone decides what a run is: arguments stored in a checkpoint never override it. The model's part of the
    config is stored in each checkpoint as plain values, so that export can rebuild the module from the file alone.

    Args:
        args: The command line.
        run: Whether the command line starts with a command, which is then run.
    """

    def __init__(self, args: list[str], run: bool = True) -> None:
        defaults = trainer_defaults(args)
        self._default_folder = defaults["default_root_dir"]
        super().__init__(
            BaseModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_callback=RunConfig,
            trainer_defaults={**defaults, "callbacks": [SampleWriter()]},
            parser_class=OneLineParser,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=args,
            run=run,
        )

    @property
    def _command_config(self) -> Any:
        command = self.config.get("subcommand")
        return self.config[command] if command else self.config

    @property
    def _data_arguments(self) -> dict[str, Any]:
        return dict(self._command_config["data"].get("init_args") or {})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of a run that the trainer, the model and the data do not have."""
        add_run_options(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse without LightningCLI's warning about arguments that do not come from ``sys.argv``."""
        assert isinstance(parser, OneLineParser)
        parser.prefer_whole_numbers()
        with overlaid_values(CALLBACK_DEFAULTS, logger_arguments(self._default_folder)) as lines:
            self.config = parser.parse_args(args)
        for line in lines:
            rank_zero_info(line)
        config = expand_home(self._command_config)
        import_modules(config.imports)
        move_base(config)
        check_checkpoint_period(config.checkpoint)
        check_trainer_numbers(config.trainer, config.seed_everything)

    def _parse_ckpt_path(self) -> None:
        """Check the checkpoint. LightningCLI would replace values of the config by arguments that it stores."""
        check_path(self._command_config.get("ckpt_path"))

    def before_instantiate_classes(self) -> None:
        """Put all files of the run into its folder."""
        check()
        place_run(self._command_config, self._default_folder)
        place_validations(self._command_config)

    def instantiate_classes(self) -> None:
        """Build module, data and trainer; an error of a constructor becomes one line."""
        try:
            super().instantiate_classes()
        except ConfigurationError:
            raise
        except ValueError as error:
            if "Does not validate against" not in str(error):
                raise
            raise ConfigurationError(one_line(str(error), CONFIGURABLE)) from error

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Any]) -> L.Trainer:
        """Build the trainer with the default callbacks that the config does not replace."""
        try:
            return super()._instantiate_trainer(with_run_callbacks(config, callbacks), [])
        except (MisconfigurationException, ImportError, ValueError, TypeError) as error:
            raise ConfigurationError(f"trainer: {error}") from error

    def after_instantiate_classes(self) -> None:
        """Store the model's part of the config as its hyper-parameters; refuse a run that cannot work, early."""
        check()
        check_kernels(self.trainer.strategy.root_device)
        check_device(self.trainer.strategy.root_device, str(self.trainer.precision))
        if isinstance(self.model._builder, CausalLM):  # others know their vocabulary only once they are built
            tokens, rows = getattr(self.datamodule, "vocab_size", None), self.model._builder.vocab_size
            check_vocabulary(tokens, rows)
            if isinstance(tokens, int) and isinstance(rows, int) and rows > tokens:
                rank_zero_info(
                    f"the data has {tokens:,} tokens: {rows - tokens:,} of the model's {rows:,} are never used"
                )
        config = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        self.model.save_hyperparameters(config.get(str(self.subcommand), config)["model"])

    def _run_subcommand(self, subcommand: str) -> None:
        """Run a command; only ``fit`` locks its folders, so that an evaluation can run at the same time."""
        writes = subcommand == "fit" and self.trainer.is_global_zero and not self.trainer.fast_dev_run  # type: ignore[attr-defined]
        folders = written_folders(self.trainer) if writes else []
        for folder in folders:
            if not folder.exists():  # CSVLogger takes a folder with nothing but the lock for one with older logs
                message = rf"Experiment logs directory {re.escape(str(folder))}/? exists"
                warnings.filterwarnings("ignore", message=message)
        planned = check_fits(self.model, self._data_arguments, self.trainer) if subcommand == "fit" else None
        with (
            holding(folders),
            no_child_left(self.trainer),
            naming_checkpoint(self.model),
            naming_memory(planned, self.trainer),
        ):
            super()._run_subcommand(subcommand)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Replace ``last`` and ``best`` by the path of a checkpoint."""
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        kwargs["ckpt_path"] = checkpoint_of(self.trainer, kwargs.get("ckpt_path"), subcommand)
        self.model.resume_from = kwargs["ckpt_path"]
        check()
        return kwargs


class RunConfig(SaveConfigCallback):
    """Writes the config of a training run to its folder, once a batch is trained.

    A run that is refused, fails before its first step, or only evaluates leaves the config of an earlier run as it is.

    Attributes:
        config_sha256: Sha256 of the file; None if none is written. The summary of the run has it.
    """

    config_sha256: str | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write nothing yet: a checkpoint may still be refused."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Write ``config.yaml``."""
        if self.already_saved:
            return
        self.already_saved = True
        folder = run_folder(trainer)  # a broadcast, in which every rank takes part
        if folder is not None and trainer.is_global_zero:
            text = self.parser.dump(self.config, skip_none=False)
            write_text(folder / self.config_filename, text)
            self.config_sha256 = hashlib.sha256(text.encode()).hexdigest()


@contextlib.contextmanager
def no_child_left(trainer: L.Trainer) -> Iterator[None]:
    """Kill the ranks that this process has started when it fails: a rank that is stopped would remain for ever."""
    try:
        yield
    except Exception:
        launcher: Any = trainer.strategy.launcher
        if getattr(launcher, "procs", None):
            launcher.kill(signal.SIGKILL)
            launcher.procs.clear()  # Lightning's observer would kill this process when one of the ranks ends
        raise


class PlanCLI(OrthotrainCLI):
    """Parses a config as fit does, then builds the network from fake tensors and counts."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Describe the command in ``--help``."""
        description = "Count the parameters and bytes of a config before anything is allocated."
        return super().init_parser(**{**kwargs, "prog": "orthotrain plan", "description": description})

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Build no trainer: a plan for eight GPUs can be made on a laptop."""

    def after_instantiate_classes(self) -> None:
        """Plan."""
        try:
            chosen()
        except ValueError as error:
            raise ConfigurationError(str(error)) from error
        shape = batch_shape(self._data_arguments)
        if shape is None:
            raise ConfigurationError(
                f"{self.config['data']['class_path']} has no batch_size and sequence_length (or max_length), from "
                "which a plan knows the shape of its batches"
            )
        self.shape = (*shape, self.config["trainer"]["precision"])
        self.plan = plan_run(self.model, *self.shape)
