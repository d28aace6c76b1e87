"""LightningCLI with one-line errors, self-describing checkpoints and the planner."""

import contextlib
import re
import signal
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from jsonargparse import _typehints, get_loader, set_loader
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.trainer.connectors import checkpoint_connector
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.optim.lr_scheduler import LRScheduler

import orthotrain.callbacks
import orthotrain.data
import orthotrain.export.folder
import orthotrain.optimizers
import orthotrain.schedules  # noqa: F401
from orthotrain.callbacks.run_progress import RunProgress
from orthotrain.callbacks.sample_writer import SampleWriter
from orthotrain.checkpoints.reading import describe_checkpoint, refuse_run_folder
from orthotrain.checkpoints.resume import check_resumable
from orthotrain.checkpoints.run_folder import checkpoint_folders, written_folders
from orthotrain.cli.ckpt_path import best_checkpoint, last_checkpoint
from orthotrain.cli.memory_advice import check_fits, naming_memory
from orthotrain.cli.run_lock import holding
from orthotrain.cli.trainer_numbers import check_trainer_numbers, prefer_whole_numbers
from orthotrain.cli.yaml_check import VALUE_ERRORS, check_yaml
from orthotrain.console.config_errors import one_line
from orthotrain.console.termination import check
from orthotrain.devices.accelerators import check_device
from orthotrain.errors import ConfigurationError, DeviceMemoryExhausted, TrainingDiverged
from orthotrain.files.atomic_writes import write_text
from orthotrain.files.paths import local_path
from orthotrain.kernels.dispatch import chosen
from orthotrain.layers.checks import check_kernels
from orthotrain.models import CausalLM, ModelBuilder, check_vocabulary
from orthotrain.modules import BaseModule, ClipRamp, LoraLayers, OftLayers, Optimization, PoetLayers
from orthotrain.plugins import Parameterization

CONFIGURABLE = (
    BaseModule, ModelBuilder, ClipRamp, LoraLayers, OftLayers, Optimization, PoetLayers, Parameterization,
    L.LightningDataModule, L.Callback, L.Trainer, Logger, LRScheduler, torch.optim.Optimizer,
)  # fmt: skip
"""What a config names by class: their subclasses and arguments are what a misspelt name is compared with."""

HELP_OF = {"--model.help": (BaseModule,), "--data.help": (L.LightningDataModule,)}
"""Options that name a class -> what it has to subclass."""


_load_yaml = get_loader("yaml")


def load_yaml(text: str) -> Any:
    """Parse a value or a file that a user gives, as jsonargparse does, once it is known to be of bounded size."""
    shown = text if len(text) <= 40 else f"{text[:40]}..."
    check_yaml(text, f"the value {shown!r}")
    try:
        return _load_yaml(text)
    except VALUE_ERRORS as error:  # jsonargparse knows YAMLError alone
        raise yaml.YAMLError(str(error)) from error


class OneLineParser(LightningArgumentParser):
    """A parser whose complaints are a single line, and which knows an option by its whole name alone."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # an abbreviation may be a misspelling: --trainer.max_step is max_steps
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})
        set_loader("yaml", load_yaml, (yaml.YAMLError,))

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Raise what ``main`` prints: the innermost cause, not the whole tree of attempts."""
        options = [option for parser in self._parsers() for option in parser._option_string_actions]
        bases = HELP_OF.get(message.partition(":")[0], CONFIGURABLE)
        raise ConfigurationError(one_line(message, bases, options)) from ex

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """Return the help without the classes of other packages: all of torch.nn is known to subclass what we take."""
        every = _typehints.get_all_subclass_paths

        def own(*types: Any, **options: Any) -> list[str]:
            return [name for name in every(*types, **options) if name.startswith("orthotrain.")]

        _typehints.get_all_subclass_paths = own
        try:
            return super().format_help(*args, **kwargs)
        finally:
            _typehints.get_all_subclass_paths = every

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
            save_config_callback=RunConfig,
            trainer_defaults={"callbacks": [SampleWriter()]},
            parser_class=OneLineParser,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=args,
            run=run,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add one option for what the trainer and every logger have one each for."""
        parser.add_argument(
            "--run_folder",
            type=str | None,
            default=None,
            help="Folder of the run: checkpoints, logs, reports. In place of the trainer's default_root_dir and of the "
            "loggers' save_dir.",
        )

    def before_instantiate_classes(self) -> None:
        """Refuse paths that no folder can have; put the run where ``--run_folder`` says."""
        check()
        config = self.config[self.subcommand] if self.subcommand else self.config
        for name, path in (("run_folder", config.run_folder), ("default_root_dir", config.trainer.default_root_dir)):
            if path is not None:
                local_path(path, name)
        if config.run_folder is None:
            return
        config.trainer.default_root_dir = config.run_folder
        loggers = config.trainer.logger if isinstance(config.trainer.logger, list) else [config.trainer.logger]
        for logger in loggers:
            if "save_dir" in getattr(logger, "init_args", ()):
                logger.init_args.save_dir = config.run_folder

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse without LightningCLI's warning about arguments that do not come from ``sys.argv``."""
        assert isinstance(parser, OneLineParser)
        prefer_whole_numbers(option for part in parser._parsers() for option in part._actions)
        self.config = parser.parse_args(args)
        command = self.config.get("subcommand")
        config = self.config[command] if command else self.config
        check_trainer_numbers(config.trainer, config.seed_everything)

    def _parse_ckpt_path(self) -> None:
        """Check the checkpoint, but leave the config as the user wrote it.

        LightningCLI would lay the arguments stored in the checkpoint over it.
        """
        path = self.config.get(f"{self.config.get('subcommand')}.ckpt_path")
        if path is None or path in ("last", "best", "hpc"):
            return
        local_path(path, "--ckpt_path")
        if not Path(path).exists():
            raise ConfigurationError(f"--ckpt_path {path!r} does not exist; give a file of a run, or last, or best")
        refuse_run_folder(Path(path))
        describe_checkpoint(path)  # before the data is prepared; its values are compared with checksums when it is read

    def _run_subcommand(self, subcommand: str) -> None:
        """Run; only ``fit`` keeps other runs out of its folders, so that an evaluation can run beside it."""
        writes = subcommand == "fit" and self.trainer.is_global_zero and not self.trainer.fast_dev_run  # type: ignore[attr-defined]
        folders = written_folders(self.trainer) if writes else []
        for folder in folders:
            if not folder.exists():  # CSVLogger warns of older logs where only the lock lies
                message = rf"Experiment logs directory {re.escape(str(folder))}/? exists"
                warnings.filterwarnings("ignore", message=message)
        planned = check_fits(self.model, self._data_arguments(), self.trainer) if subcommand == "fit" else None
        with (
            holding(folders),
            no_child_left(self.trainer),
            naming_checkpoint(self.model),
            naming_memory(planned, self.trainer),
        ):
            super()._run_subcommand(subcommand)

    def _data_arguments(self) -> dict[str, Any]:
        config = self.config[self.subcommand] if self.subcommand else self.config
        return dict(config["data"].get("init_args") or {})

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Let ``--ckpt_path last`` be the newest checkpoint that is whole, and ``best`` the one that it names."""
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if kwargs.get("ckpt_path") == "last":
            kwargs["ckpt_path"] = last_checkpoint(self.trainer, resumes=subcommand == "fit")
            if kwargs["ckpt_path"] is None and subcommand != "fit":
                raise ConfigurationError(f"--ckpt_path last: this run has no checkpoint to {subcommand}; fit it first")
        elif kwargs.get("ckpt_path") == "best":
            kwargs["ckpt_path"] = best_checkpoint(self.trainer)
        elif kwargs.get("ckpt_path") is None:
            self._tell_without_checkpoint(subcommand)
        if kwargs.get("ckpt_path") is not None and subcommand == "fit":
            check_resumable(kwargs["ckpt_path"])
        self.model.resume_from = kwargs.get("ckpt_path")
        check()
        return kwargs

    def _tell_without_checkpoint(self, subcommand: str) -> None:
        """Say what a user who left out ``--ckpt_path`` may not have meant."""
        if subcommand != "fit":
            rank_zero_info(f"no --ckpt_path: {subcommand} takes the network as the config builds it, not a trained one")
        for folder in checkpoint_folders(self.trainer) if subcommand == "fit" else ():
            if folder.is_dir() and any(folder.rglob("*.ckpt")):
                rank_zero_info(
                    f"{folder} has checkpoints of an earlier run, which this one begins anew and may replace: to go on "
                    "from them give --ckpt_path last, to keep them another --run_folder"
                )

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[L.Callback]) -> L.Trainer:
        """Build the trainer, with this package's progress bar if the config names none."""
        given = [config["callbacks"]] if isinstance(config["callbacks"], L.Callback) else config["callbacks"] or []
        if config["enable_progress_bar"] is not False and not any(isinstance(c, ProgressBar) for c in given):
            callbacks = [*callbacks, RunProgress()]
        try:
            return super()._instantiate_trainer(config, callbacks)
        except (MisconfigurationException, ImportError, ValueError, TypeError) as error:
            raise ConfigurationError(f"trainer: {error}") from error

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
        """Store the model's part of the config as its hyper-parameters; refuse early what cannot run."""
        check()
        check_kernels(self.trainer.strategy.root_device)
        check_device(self.trainer.strategy.root_device, str(self.trainer.precision))
        if isinstance(self.model._builder, CausalLM):  # else it is known when the text is tokenized and the model built
            check_vocabulary(getattr(self.datamodule, "vocab_size", None), self.model._builder.vocab_size)
        config = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        if self.subcommand is not None:
            config = config[self.subcommand]
        self.model.save_hyperparameters(config["model"])


class RunConfig(SaveConfigCallback):
    """Writes the config of a run to its folder, whole or not at all; an evaluation leaves the run's own in place."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write ``config.yaml`` when fitting begins."""
        if stage != "fit" or self.already_saved:
            return
        folder = trainer.log_dir  # a broadcast, in which every rank takes part
        if folder is not None and trainer.is_global_zero:
            write_text(Path(folder) / self.config_filename, self.parser.dump(self.config, skip_none=False))
        self.already_saved = True


@contextlib.contextmanager
def no_child_left(trainer: L.Trainer) -> Iterator[None]:
    """End the processes that this one has started as ranks when it fails: one that is stopped would stay for ever."""
    try:
        yield
    except Exception:
        launcher: Any = trainer.strategy.launcher
        if getattr(launcher, "procs", None):
            launcher.kill(signal.SIGKILL)
            launcher.procs.clear()  # Lightning's observer would kill this process for the end of one of them
        raise


@contextlib.contextmanager
def naming_checkpoint(module: BaseModule) -> Iterator[None]:
    """Name the checkpoint where what it holds could not be restored.

    Raises:
        ConfigurationError: In the place of whatever Lightning raised while it restored the checkpoint.
    """
    try:
        yield
    except (TrainingDiverged, DeviceMemoryExhausted, OSError):
        raise
    except Exception as error:
        if not raised_while_restoring(error) or str(module.resume_from) in str(error):
            raise
        if isinstance(error, ConfigurationError):
            raise ConfigurationError(f"checkpoint {module.resume_from!r}: {error}") from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ConfigurationError(
            f"checkpoint {module.resume_from!r} cannot be restored in this run: {reason}"
        ) from error


def raised_while_restoring(error: BaseException) -> bool:
    """Tell whether an error was raised while Lightning restored a checkpoint, and not by training or evaluating."""
    codes = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = [code.co_name for code in codes if code.co_filename == checkpoint_connector.__file__]
    return any(name.lstrip("_").startswith(("restore", "resume_start")) for name in names)


class PlanCLI(OrthotrainCLI):
    """Parses a config like fit, but builds the network from fake tensors and counts."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Let ``--help`` say what the command is."""
        description = "Count the parameters and bytes of a config before anything is allocated."
        return super().init_parser(**{**kwargs, "prog": "orthotrain plan", "description": description})

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Build no trainer: a plan for eight GPUs can be made on a laptop."""

    def after_instantiate_classes(self) -> None:
        """Plan."""
        from orthotrain.cli.plan import plan_run

        try:
            chosen()
        except ValueError as error:
            raise ConfigurationError(str(error)) from error
        data = self._data_arguments()
        size, length = data.get("batch_size"), data.get("sequence_length") or data.get("max_length")
        if not isinstance(size, int) or not isinstance(length, int):
            raise ConfigurationError(
                f"{self.config['data']['class_path']} has no batch_size and sequence_length (or max_length), from "
                "which a plan knows the shape of its batches"
            )
        self.plan = plan_run(self.model, size, length, self.config["trainer"]["precision"])
