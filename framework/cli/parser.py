"""The parser of the trainer's commands: errors of one line, bounded YAML, and help about this package's classes only.

Private attributes of argparse and of jsonargparse (4.53) are read in this file alone. Neither library offers a public
list of the options of a parser with their types.
"""

import functools
import operator
import re
from collections.abc import Iterator
from typing import Any, get_args

import lightning as L
import torch
import yaml
from jsonargparse import DefaultHelpFormatter, get_loader, set_loader
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger
from torch.optim.lr_scheduler import LRScheduler

import orthotrain.callbacks
import orthotrain.data
import orthotrain.export.folder
import orthotrain.optimizers
import orthotrain.schedules  # noqa: F401 - a config may name the classes of these modules
from orthotrain.cli.config_files import VALUE_ERRORS, check_yaml
from orthotrain.console.config_errors import one_line
from orthotrain.errors import ConfigurationError
from orthotrain.models import ModelBuilder
from orthotrain.modules import BaseModule, ClipRamp, LoraLayers, OftLayers, Optimization, PoetLayers
from orthotrain.plugins import Parameterization

CONFIGURABLE = (
    BaseModule, ModelBuilder, ClipRamp, LoraLayers, OftLayers, Optimization, PoetLayers, Parameterization,
    L.LightningDataModule, L.Callback, L.Trainer, Logger, LRScheduler, torch.optim.Optimizer,
)  # fmt: skip
"""Base classes of everything that a config names. A misspelt name is compared with their subclasses and arguments."""

HELP_OF = {"--model.help": (BaseModule,), "--data.help": (L.LightningDataModule,)}
"""Options that take the name of a class, with the base class of the classes that they take."""

_load_yaml = get_loader("yaml")
_KNOWN_SUBCLASSES = re.compile(r", known subclasses: ([\w., ]+)")


def load_yaml(text: str) -> Any:
    """Parse a value or a file from the user as jsonargparse does, but refuse YAML of unbounded size first."""
    shown = text if len(text) <= 40 else f"{text[:40]}..."
    check_yaml(text, f"the value {shown!r}")
    try:
        return _load_yaml(text)
    except VALUE_ERRORS as error:  # jsonargparse handles YAMLError alone
        raise yaml.YAMLError(str(error)) from error


class OwnClassesFormatter(DefaultHelpFormatter):
    """Help that names this package's subclasses of a type. jsonargparse would also list every subclass in torch.nn."""

    def _get_help_string(self, action: Any) -> str:
        return _KNOWN_SUBCLASSES.sub(_own_classes, super()._get_help_string(action))


def _own_classes(known: re.Match[str]) -> str:
    own = [name for name in known[1].split(", ") if name.startswith("orthotrain.")]
    return f", known subclasses: {', '.join(own)}" if own else ""


class OneLineParser(LightningArgumentParser):
    """A parser whose errors are one line, and which accepts an option only by its whole name."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # an abbreviation may be a misspelling: --trainer.max_step is max_steps
        super().__init__(*args, **{"allow_abbrev": False, "formatter_class": OwnClassesFormatter, **kwargs})
        set_loader("yaml", load_yaml, (yaml.YAMLError,))

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Raise the innermost cause as the error that ``main`` prints, instead of the whole tree of attempts."""
        options = [option for parser in self._parsers() for option in parser._option_string_actions]
        bases = HELP_OF.get(message.partition(":")[0], CONFIGURABLE)
        raise ConfigurationError(one_line(message, bases, options)) from ex

    def prefer_whole_numbers(self) -> None:
        """Keep a whole number whole in options that take an int or a float: 1 is one batch, 1.0 is all batches.

        Python keeps one object for ``Union[int, float]`` and ``Union[float, int]``. The order of its types depends on
        what was imported first, and jsonargparse converts a value to the first type that takes it.
        """
        for option in (option for parser in self._parsers() for option in parser._actions):
            types = get_args(getattr(option, "_typehint", None))
            if int in types and float in types:
                others = (kind for kind in types if kind is not int)
                option._typehint = functools.reduce(operator.or_, (int, *others))  # type: ignore[attr-defined]

    def _parsers(self) -> Iterator["OneLineParser"]:
        yield self
        if self._subcommands_action:
            yield from self._subcommands_action.choices.values()
