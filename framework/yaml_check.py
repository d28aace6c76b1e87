"""What YAML may hold before it is parsed: bounded depth and size, aliases counted as what they stand for, no tags."""

from dataclasses import dataclass
from typing import Any

import yaml

from orthotrain.errors import ConfigurationError

MAX_CHARACTERS = 512 << 10
MAX_DEPTH = 60
MAX_VALUES = 50_000
"""Most values, those behind an alias counted each time that it is used."""

_SPECIAL = frozenset("[{&*!\n")
_STANDARD = "tag:yaml.org,2002:"
_TAGS = {_STANDARD + name for name in ("null", "bool", "int", "float", "str", "seq", "map", "set", "binary")} | {"!"}


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
            value that it stands for, or a tag such as ``!!python/object``.
    """
    if len(text) > MAX_CHARACTERS:
        raise ConfigurationError(f"{where} has {len(text):,} characters; YAML has at most {MAX_CHARACTERS:,} here")
    if _SPECIAL.isdisjoint(text):
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
