"""Checks of YAML before it is parsed: its depth, size and numbers are bounded, and its values are plain."""

from dataclasses import dataclass
from typing import Any

import yaml

from orthotrain.errors import ConfigurationError

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
