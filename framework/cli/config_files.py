"""Finds config files, those of the user before the configs of the package, and checks YAML before it is parsed."""

import difflib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import orthotrain.configs
from orthotrain.errors import ConfigurationError
from orthotrain.files.paths import check_regular_file, local_path

MAX_CHARACTERS = 512 << 10
MAX_DEPTH = 60
MAX_VALUES = 50_000
"""Largest number of values; the values behind an alias count at each use of the alias."""
MAX_NUMBER = 100
"""Largest number of characters of a number: Python refuses to print a number of thousands of digits."""

VALUE_ERRORS = (yaml.YAMLError, ValueError, LookupError, ArithmeticError, TypeError, AttributeError, RecursionError)
"""Errors that PyYAML raises for invalid text."""

_SPECIAL = frozenset("[{&*!\n")
_STANDARD = "tag:yaml.org,2002:"
_TAGS = {_STANDARD + name for name in ("null", "bool", "int", "float", "str", "seq", "map", "set", "binary")} | {"!"}

_NUMBERS = frozenset({_STANDARD + "int", _STANDARD + "float"})


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
        read_config(path)
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


def read_config(path: Path) -> dict[str, Any]:
    """Return the keys of a config file.

    Raises:
        ConfigurationError: The file cannot be read, is not valid YAML of bounded size, or has no keys.
    """
    where = f"config {str(path)!r}"
    check_regular_file(path, "config")
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_CHARACTERS + 1)
        check_yaml(text, where)
        content = _content(text, where)
    except ConfigurationError:
        raise
    except VALUE_ERRORS as error:
        raise ConfigurationError(f"{where} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        found = "is empty" if content is None else f"holds a {type(content).__name__}"
        raise ConfigurationError(f"{where} {found}: it must have keys, such as trainer, model and data")
    return content


def _content(text: str, where: str) -> Any:
    """Return what YAML holds, as ``yaml.safe_load`` does, unless a mapping has a key twice."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        _refuse_repeated(node, where)
        return None if node is None else loader.construct_document(node)
    finally:
        loader.dispose()


def _refuse_repeated(node: Any, where: str) -> None:
    """Refuse a key that a mapping has twice: YAML would drop the first value without a word."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_repeated(item, where)
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode):
                if key.value in lines:
                    raise ConfigurationError(
                        f"{where}, line {line}: {key.value!r:.60} stands in line {lines[key.value]} already; write its "
                        "values in one place"
                    )
                lines[key.value] = line
            _refuse_repeated(value, where)


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
    """Resolve the configs of a command line (``-c NAME``, ``-cNAME``, ``--config NAME``) and put them first.

    The parser applies the arguments in their order. With the configs first, an option overrides a config that is named
    after the option.

    Args:
        arguments: The arguments after the command.

    Raises:
        ConfigurationError: As :func:`resolve_config`; or if the last option has no value.
    """
    configs, options = [], []
    remaining = iter(arguments)
    for argument in remaining:
        _check_argument(argument)
        option, equals, name = argument.partition("=")
        if argument.startswith("-c") and option != "-c":
            option, equals, name = "-c", "=", argument.removeprefix("-c")
        if option not in ("-c", "--config"):
            options.append(argument)
            continue
        name = name if equals else next(remaining, "")
        if not name:
            raise ConfigurationError(f"{argument} needs the name of a config, such as pretrain/quickstart.yaml")
        _check_argument(name)
        configs.append(f"--config={resolve_config(name)}")
    return [*configs, *options]


@dataclass
class _Collection:
    anchor: str | None
    values: int = 1


def check_yaml(text: str, where: str) -> None:
    """Refuse YAML that names a class, or that takes much time or memory to parse, print or compare.

    Args:
        text: The YAML. Text with a syntax error passes, because the parser refuses it.
        where: Name of the file or the value, for messages.

    Raises:
        ConfigurationError: The text is too long, is nested too deeply or has too many values; an alias is inside the
            value that it stands for; a tag is not plain, such as ``!!python/object``; a number has too many digits; or
            a value does not fit its tag.
    """
    if len(text) > MAX_CHARACTERS:
        raise ConfigurationError(f"{where} has {len(text):,} characters; at most {MAX_CHARACTERS:,} are read")
    if len(text) <= MAX_NUMBER and _SPECIAL.isdisjoint(text):
        return
    anchors: dict[str, int] = {}
    open_: list[_Collection] = [_Collection(None, 0)]
    try:
        # the parser in Python yields one event at a time, so nothing after a refused event is read
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            _count(event, open_, anchors, where)
    except yaml.YAMLError:
        return


def _count(event: Any, open_: list[_Collection], anchors: dict[str, int], where: str) -> None:
    anchor, tag = getattr(event, "anchor", None), getattr(event, "tag", None)
    if tag is not None and tag not in _TAGS:
        raise ConfigurationError(f"{where} has the tag {tag!r}: only plain YAML values are read; remove the tag")
    if isinstance(event, yaml.CollectionStartEvent):
        open_.append(_Collection(anchor))
        if len(open_) > MAX_DEPTH:
            raise ConfigurationError(f"{where} is YAML with more than {MAX_DEPTH} levels; give fewer levels")
        return
    if isinstance(event, yaml.CollectionEndEvent):
        collection = open_.pop()
        anchor, values = collection.anchor, collection.values
    elif isinstance(event, yaml.AliasEvent):
        if any(collection.anchor == anchor for collection in open_):
            raise ConfigurationError(f"{where} has the alias *{anchor} inside the value that it stands for; remove it")
        anchor, values = None, anchors.get(anchor or "", 1)
    elif isinstance(event, yaml.ScalarEvent):
        _check_scalar(event, where)
        values = 1
    else:
        return
    if anchor is not None:
        anchors[anchor] = values
    open_[-1].values += values
    if open_[-1].values > MAX_VALUES:
        raise ConfigurationError(
            f"{where} has more than {MAX_VALUES:,} values, where an alias counts as all its values; give fewer"
        )


def _check_scalar(event: yaml.ScalarEvent, where: str) -> None:
    """Refuse a number with too many digits, and a value that does not fit its tag."""
    if event.tag is None and (len(event.value) <= MAX_NUMBER or not event.implicit[0]):
        return
    loader = yaml.SafeLoader("")
    tag = event.tag or loader.resolve(yaml.ScalarNode, event.value, event.implicit)
    position = f"{where}, line {event.start_mark.line + 1}: the value {event.value[:40]!r}"
    if tag in _NUMBERS and len(event.value) > MAX_NUMBER:
        raise ConfigurationError(
            f"{position}... is a number of {len(event.value):,} characters; at most {MAX_NUMBER} are read"
        )
    if event.tag is None or tag == "!":
        return
    try:
        loader.construct_object(yaml.ScalarNode(tag, event.value), deep=True)
    except VALUE_ERRORS as error:
        name = tag.removeprefix(_STANDARD)
        raise ConfigurationError(f"{position} does not fit its tag !!{name}; correct it or remove the tag") from error
