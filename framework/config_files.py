"""Finding config files: the user's own first, then those that ship with the package."""

import difflib
from pathlib import Path

import yaml

import orthotrain.configs
from orthotrain.errors import ConfigurationError


def shipped_configs() -> dict[str, Path]:
    """Return relative name -> path of every config that ships with the package."""
    root = Path(orthotrain.configs.__file__).parent
    return {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*.yaml"))}


def resolve_config(name: str) -> str:
    """Return the path of a config: ``name`` itself if that file exists, else the shipped config of that name.

    Raises:
        ConfigurationError: If there is neither, naming the nearest shipped ones; or if it is not valid YAML.
    """
    shipped = shipped_configs()
    path = Path(name) if Path(name).is_file() else shipped.get(name)
    if path is not None:
        _check_syntax(path)
        return str(path)
    near = difflib.get_close_matches(name, shipped, n=3, cutoff=0.4) or sorted(shipped)
    raise ConfigurationError(f"config {name!r} is neither a file nor shipped; shipped are {', '.join(near)}")


def _check_syntax(path: Path) -> None:
    try:
        yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"config {str(path)!r} is not valid YAML: {error}") from error


def resolve_config_arguments(arguments: list[str]) -> list[str]:
    """Resolve the value of every ``-c``/``--config`` on a command line."""
    resolved, expects = [], False
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if expects:
            argument, expects = resolve_config(argument), False
        elif argument in ("-c", "--config"):
            expects = True
        elif equals and option in ("-c", "--config"):
            argument = f"--config={resolve_config(value)}"
        resolved.append(argument)
    return resolved
