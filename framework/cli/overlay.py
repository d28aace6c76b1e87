"""How a value of a later config or option is laid over an earlier one: dicts of plain values are merged key by key.

jsonargparse (4.53) replaces a whole dict, passes ``None`` on to an option of a nested dataclass as the text ``"None"``,
and drops arguments that a new class does not take without a word. It offers no hook for any of that. This module, and
no other, replaces functions of jsonargparse, and only while a command line is parsed.
"""

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

from jsonargparse import Namespace, _typehints
from lightning.pytorch.loggers import Logger

REPLACE = "_replace_"
"""Key of a dict that replaces the earlier dict as a whole, where the key's value is true."""

_adapt = _typehints.adapt_typehints
_discard = _typehints.discard_init_args_on_class_path_change
_CONTAINERS = {*_typehints.sequence_or_mapping_origin_types, _typehints.Union}


@contextlib.contextmanager
def overlaid_values(
    defaults: Mapping[str, Mapping[str, Any]], loggers: Mapping[str, Mapping[str, Any]] | None = None
) -> Iterator[list[str]]:
    """Merge dicts while the block parses a command line; yield a list that gets a line for each change of a class.

    Args:
        defaults: Class path -> arguments that no user has given. The lines do not name them, nor defaults of classes.
        loggers: Name of a logger's class -> arguments of a logger without a ``save_dir``.
    """
    lines: list[str] = []

    def adapt(value: Any, kind: Any, *args: Any, **kwargs: Any) -> Any:
        if kind is Logger and loggers:
            value = _with_folder(value, kwargs.get("prev_val"), loggers)
        return _adapt_merged(value, kind, *args, **kwargs)

    def discard(parser: Any, before: Any, given: Any) -> None:
        arguments = _arguments(before)
        _discard(parser, before, given)
        dropped = {name: value for name, value in arguments.items() if name not in _arguments(before)}
        if not dropped:
            return
        class_path = before["class_path"]
        unset = {**_defaults(class_path), **defaults.get(class_path, {})}
        names = [name for name, value in dropped.items() if name not in unset or unset[name] != value]
        old, new = (path.rpartition(".")[2] for path in (class_path, given["class_path"]))
        line = f"class {new} takes the place of {old}, without its {', '.join(names)}"
        if names and line not in lines:
            lines.append(line)

    adapting = mock.patch.object(_typehints, "adapt_typehints", adapt)
    discarding = mock.patch.object(_typehints, "discard_init_args_on_class_path_change", discard)
    with adapting, discarding:
        yield lines


def _with_folder(value: Any, before: Any, loggers: Mapping[str, Mapping[str, Any]]) -> Any:
    """Return a new logger with the arguments of a logger in the run folder, where it has no folder of its own."""
    spec = {"class_path": value} if isinstance(value, str) else value
    if not isinstance(spec, dict | Namespace) or "class_path" not in spec:
        return value
    name = str(spec["class_path"]).rpartition(".")[2]
    arguments = dict(Namespace(spec.get("init_args") or {}).items(branches=True, nested=False))
    old = (
        str(before["class_path"]).rpartition(".")[2] if isinstance(before, Namespace) and "class_path" in before else ""
    )
    if name not in loggers or name == old or "save_dir" in arguments:
        return value
    return {"class_path": spec["class_path"], "init_args": {**loggers[name], **arguments}}


def _arguments(spec: Any) -> dict[str, Any]:
    arguments = spec.get("init_args") if isinstance(spec, Namespace) else None
    return dict(vars(arguments)) if isinstance(arguments, Namespace) else {}


def _defaults(class_path: str) -> dict[str, Any]:
    try:
        parameters = inspect.signature(_typehints.import_object(class_path)).parameters
    except Exception:  # a class of an extension without a signature, or whose import fails; the parser reports that
        return {}
    return {name: parameter.default for name, parameter in parameters.items()}


def _adapt_merged(value: Any, kind: Any, *args: Any, **kwargs: Any) -> Any:
    """Check a value as jsonargparse does, after a dict of plain values is merged into the earlier dict."""
    if kwargs.get("serialize") or kwargs.get("instantiate_classes"):
        return _adapt(value, kind, *args, **kwargs)
    origin = _typehints.get_typehint_origin(kind) or kind
    nested, text = isinstance(value, _typehints.NestedArg), kwargs.get("orig_val")
    if origin in _typehints.mapping_origin_types:
        before = kwargs.get("prev_val")
        before = before if isinstance(before, dict) else {}
        if nested:
            value = nested_under(before, value.key, value.val)
        if isinstance(value, dict):
            value = merged(before, value)
            # what is merged now is not merged once more when the values of the dict are checked one by one
            kwargs["prev_val"] = {key: item if _is_plain(item) else before.get(key) for key, item in value.items()}
    elif isinstance(value, list) and not kwargs.get("append"):
        kwargs["prev_val"] = None  # a list is replaced as a whole, and not element by element
    elif nested and origin not in _CONTAINERS and isinstance(text, _typehints.NestedArg):
        value = text._replace(key=value.key)  # an option of a class parses the text itself, as every other option does
    return _adapt(value, kind, *args, **kwargs)


def merged(before: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``before`` with the keys of ``given``; dicts of plain values inside are merged too.

    A dict with ``class_path`` is taken as it is given: the parser merges the arguments of classes.
    """
    found = {} if given.get(REPLACE) else dict(before)
    for key, item in given.items():
        if key != REPLACE:
            found[key] = merged(_plain(found.get(key)), item) if _is_plain(item) else item
    return found


def nested_under(before: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Return a dict with ``value`` under a dotted path. The longest key of ``before`` that begins the path is one key.

    Example:
        >>> nested_under({"model.*": {"lr": 1}}, "model.*.lr", 2)
        {'model.*': {'lr': 2}}
        >>> nested_under({}, "rope.factor", 2)
        {'rope': {'factor': 2}}
    """
    known = [key for key in before if isinstance(key, str) and f"{path}.".startswith(f"{key}.")]
    key = max(known, key=len, default=path.partition(".")[0])
    rest = path[len(key) + 1 :]
    return {key: nested_under(_plain(before.get(key)), rest, value) if rest else value}


def _plain(value: Any) -> dict[str, Any]:
    return value if _is_plain(value) else {}


def _is_plain(value: Any) -> bool:
    return isinstance(value, dict) and "class_path" not in value
