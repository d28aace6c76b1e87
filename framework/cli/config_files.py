"""Finds config files: the files of the user first, then the configs of the package."""

import difflib
import os
from pathlib import Path

import yaml

import orthotrain.configs
from orthotrain.cli.yaml_check import MAX_CHARACTERS, VALUE_ERRORS, check_yaml
from orthotrain.errors import ConfigurationError
from orthotrain.files.paths import check_regular_file, local_path


def shipped_configs() -> dict[str, Path]:
    """Return the relative name and the path of every config of the package."""
    root = Path(orthotrain.configs.__file__).parent
    return {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*.yaml"))}


def resolve_config(name: str) -> str:
    """Return the path of a config: ``name`` itself if that file exists, else the config of the package with that name.

    Raises:
        ConfigurationError: If neither exists (the message names similar configs), or if the file is not valid YAML or
            has no keys.
    """
    shipped = shipped_configs()
    local_path(name, "config")
    path = Path(name) if _is_there(name) else shipped.get(name)
    if path is not None:
        _check_syntax(path)
        return str(path)
    # the last part of the name (quickstart.yaml), or the name without its suffix (pretrain/quickstart, quickstart)
    same = [full for full in shipped if Path(name).name in (Path(full).name, Path(full).stem)]
    same = [full for full in same if full.startswith(str(Path(name).parent))] or same if "/" in name else same
    near = same or difflib.get_close_matches(name, shipped, n=3)
    hint = f"did you mean {', '.join(near)}?" if near else f"shipped are {', '.join(sorted(shipped))}"
    raise ConfigurationError(f"config {name!r} is neither a file nor shipped; {hint}")


def _is_there(name: str) -> bool:
    try:
        return Path(name).exists() and not Path(name).is_dir()
    except OSError as error:  # a name that is too long
        raise ConfigurationError(f"config {name!r} cannot be read: {error.strerror or error}") from error


def _check_syntax(path: Path) -> None:
    where = f"config {str(path)!r}"
    check_regular_file(path, "config")
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_CHARACTERS + 1)
        check_yaml(text, where)
        content = yaml.safe_load(text)
    except ConfigurationError:
        raise
    except VALUE_ERRORS as error:
        raise ConfigurationError(f"config {str(path)!r} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        found = "is empty" if content is None else f"holds a {type(content).__name__}"
        raise ConfigurationError(f"config {str(path)!r} {found}: it must have keys, such as trainer, model and data")


def _check_argument(argument: str) -> None:
    """Refuse an argument that is not UTF-8, or that names a fifo, a socket or a device.

    The parser opens any value that is the name of a file.
    """
    if any("\ud800" <= character <= "\udfff" for character in argument):
        raise ConfigurationError(
            f"argument {argument!r}: is not UTF-8, so configs and checkpoints cannot record it; rename the file, or "
            "name its folder"
        )
    value = argument.partition("=")[2] if argument.startswith("-") else argument
    if value and os.path.exists(value) and not os.path.isdir(value):
        check_regular_file(value, "argument")


def resolve_config_arguments(arguments: list[str]) -> list[str]:
    """Resolve the value of every ``-c``/``--config`` on a command line.

    Raises:
        ConfigurationError: As :func:`resolve_config`; or if the last option has no value.
    """
    resolved, expects = [], False
    for argument in arguments:
        _check_argument(argument)
        option, equals, value = argument.partition("=")
        if expects:
            argument, expects = resolve_config(argument), False
        elif argument in ("-c", "--config"):
            expects = True
        elif equals and option in ("-c", "--config"):
            argument = f"--config={resolve_config(value)}"
        resolved.append(argument)
    if expects:
        raise ConfigurationError(f"{arguments[-1]} needs the name of a config, such as pretrain/quickstart.yaml")
    return resolved
