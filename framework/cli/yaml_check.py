"""What YAML may hold before it is parsed: bounded depth, size and numbers, aliases counted in full, plain values."""

from dataclasses import dataclass
from typing import Any

import yaml

from orthotrain.errors import ConfigurationError

MAX_CHARACTERS = 512 << 10
MAX_DEPTH = 60
MAX_VALUES = 50_000
"""Most values, those behind an alias counted each time that it is used."""
MAX_NUMBER = 100
"""Most characters of a number: Python refuses to print one of thousands of digits."""

VALUE_ERRORS = (yaml.YAMLError, ValueError, LookupError, ArithmeticError, TypeError, AttributeError, RecursionError)
"""What PyYAML raises for text that stands for no value."""

_SPECIAL = frozenset("[{&*!\n")
_STANDARD = "tag:yaml.org,2002:"
_TAGS = {_STANDARD + name for name in ("null", "bool", "int", "float", "str", "seq", "map", "set", "binary")} | {"!"}

_NUMBERS = frozenset({_STANDARD + "int", _STANDARD + "float"})


@dataclass
class _Collection:
    anchor: str | None
    values: int = 1


def check_yaml(text: str, where: str) -> None:
    """Refuse YAML that parsing, printing or comparing would take much time or memory for, or that names a class.

    Args:
        text: The YAML; text that is none passes, for the parser to refuse.
        where: What holds it, for messages.

    Raises:
        ConfigurationError: A text that is too long, nested too deeply or holds too many values, an alias within the
            value that it stands for, a tag such as ``!!python/object``, a number of many digits, or a value that is
            none of its tag.
    """
    if len(text) > MAX_CHARACTERS:
        raise ConfigurationError(f"{where} has {len(text):,} characters; YAML has at most {MAX_CHARACTERS:,} here")
    if len(text) <= MAX_NUMBER and _SPECIAL.isdisjoint(text):
        return
    anchors: dict[str, int] = {}
    open_: list[_Collection] = [_Collection(None, 0)]
    try:
        # the parser in Python: it yields event after event, so that nothing behind a refused one is read
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
            raise ConfigurationError(f"{where} is YAML nested more than {MAX_DEPTH} deep; give fewer levels")
        return
    if isinstance(event, yaml.CollectionEndEvent):
        collection = open_.pop()
        anchor, values = collection.anchor, collection.values
    elif isinstance(event, yaml.AliasEvent):
        if any(collection.anchor == anchor for collection in open_):
            raise ConfigurationError(f"{where} has the alias *{anchor} within the value that it stands for; remove it")
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
            f"{where} has more than {MAX_VALUES:,} values, those behind an alias counted each time; give fewer"
        )


def _check_scalar(event: yaml.ScalarEvent, where: str) -> None:
    """Refuse a number of many digits, and a value that its tag cannot be made of."""
    if event.tag is None and (len(event.value) <= MAX_NUMBER or not event.implicit[0]):
        return
    loader = yaml.SafeLoader("")
    tag = event.tag or loader.resolve(yaml.ScalarNode, event.value, event.implicit)
    place = f"{where}, line {event.start_mark.line + 1}: the value {event.value[:40]!r}"
    if tag in _NUMBERS and len(event.value) > MAX_NUMBER:
        raise ConfigurationError(
            f"{place}... is a number of {len(event.value):,} characters; numbers have at most {MAX_NUMBER} here"
        )
    if event.tag is None or tag == "!":
        return
    try:
        loader.construct_object(yaml.ScalarNode(tag, event.value), deep=True)
    except VALUE_ERRORS as error:
        name = tag.removeprefix(_STANDARD)
        raise ConfigurationError(f"{place} is no value of its tag !!{name}; correct it or remove the tag") from error
