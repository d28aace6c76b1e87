"""Modules of the user that lie beside a config or in the working folder, and that a config or an option names."""

import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from orthotrain.cli.config_files import read_config
from orthotrain.errors import ConfigurationError

_DOTTED = re.compile(r"(?<![\w./~-])([A-Za-z_]\w*)(?:\.[A-Za-z_]\w*)+(?![\w./-])")


def add_own_folders(arguments: list[str]) -> None:
    """Put the folder of each module of the user at the end of the import path, behind all installed packages.

    A folder is added only if it holds a module that is named (``mine`` of ``mine.SecondOrder``, or of ``--imports``)
    and that is not installed. Libraries look for many optional packages: no other file of the user must take the place
    of one. Processes that are started later inherit the path, or run the same command.

    Args:
        arguments: The arguments after the command, with resolved configs (``--config=PATH``).
    """
    configs = [Path(argument.removeprefix("--config=")) for argument in arguments if argument.startswith("--config=")]
    names = {
        *_named_by_options(arguments),
        *(name for path in configs for name in _named(read_config(path))),
    }
    folders = [*(path.resolve().parent for path in configs), Path.cwd()]
    for name in sorted(filter(str.isidentifier, names)):
        if name in sys.modules or importlib.util.find_spec(name) is not None:
            continue
        for folder in folders:
            if (folder / f"{name}.py").is_file() or (folder / name / "__init__.py").is_file():
                sys.path.append(os.fspath(folder))
                break


def import_modules(names: Iterable[str] | None) -> None:
    """Import modules, so that the classes that they register are known by name.

    Raises:
        ConfigurationError: A module cannot be imported.
    """
    for name in names or ():
        try:
            importlib.import_module(name)
        except Exception as error:  # code of the user
            reason = f"{type(error).__name__}: {error}"
            raise ConfigurationError(
                f"--imports {name}: cannot be imported ({reason}); a module lies beside the config, in the working "
                "folder, or is installed"
            ) from error


def _named_by_options(arguments: list[str]) -> Iterator[str]:
    after = ""
    for argument in arguments:
        option, equals, value = argument.partition("=")
        option, value = (option, value) if equals and option.startswith("-") else (after, argument)
        if option == "--imports":
            yield from re.findall(r"\w+", value)
        elif option != "--config":
            yield from _DOTTED.findall(value)
        after = argument if argument.startswith("--") else after


def _named(value: Any, key: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _named(item, str(name))
    elif isinstance(value, list):
        for item in value:
            yield from _named(item, key)
    elif isinstance(value, str) and (key == "imports" or _DOTTED.fullmatch(value)):
        yield value.partition(".")[0]
