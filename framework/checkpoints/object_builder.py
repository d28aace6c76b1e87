"""Builds objects from the description in a checkpoint.

A description consists of plain values: ``{"class_path": name, "init_args": {...}}`` for an object, and a dictionary for
settings. The annotations of the constructor decide which type each value must have. No string is parsed, so a string
never becomes a dictionary, a file or an address. Only :class:`TrustedClasses` looks up classes.
"""

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from orthotrain.checkpoints.trusted_classes import TrustedClasses
from orthotrain.errors import ConfigurationError

KEYS = {"class_path", "init_args", "dict_kwargs"}
"""Keys in the description of an object. ``dict_kwargs`` holds the arguments for ``**kwargs`` of the constructor."""

PLAIN = (bool, int, float, str, type(None))


class ObjectBuilder:
    """Builds the objects that one checkpoint describes.

    Args:
        trusted: The classes that the checkpoint may name.
    """

    def __init__(self, trusted: TrustedClasses) -> None:
        self.trusted = trusted

    def arguments(self, owner: Callable, stored: object, position: str, given: int = 0) -> dict[str, Any]:
        """Build the arguments of a class or function.

        Args:
            owner: The class or function.
            stored: Argument name -> plain value, from the file.
            position: Position in the description, for messages.
            given: Number of leading arguments that the caller gives later.

        Raises:
            ConfigurationError: ``owner`` does not have such an argument, or the value does not fit the annotation.
        """
        if not isinstance(stored, dict):
            raise self._error(position, "a dictionary of arguments", stored)
        parameters = dict(list(parameters_of(owner).items())[given:])
        for name, value in stored.items():
            if name not in parameters:
                known = ", ".join(parameters) or "none"
                raise ConfigurationError(f"{position}: {owner.__name__} has no argument {name!r:.80}; known: {known}")
            self.trusted.check_argument(name, value, position)
        return {
            name: self.build(value, parameters[name].annotation, f"{position}.{name}") for name, value in stored.items()
        }

    def check_plain(self, value: Any, position: str) -> None:
        """Refuse names of classes that are not trusted, and values that are not plain, at any depth.

        This check runs before anything is built. It also covers values that this class passes on unchanged, because
        their receiver may look up names in them.

        Args:
            value: A value from the file.
            position: Position in the description, for messages.

        Raises:
            ConfigurationError: The message names the class or the value.
        """
        if isinstance(value, dict):
            for key, inner in value.items():
                if key == "class_path" or (key == "parameterization" and isinstance(inner, str)):
                    self.trusted.check(inner)
                self.trusted.check_argument(str(key), inner, position)
                self.check_plain(inner, f"{position}.{key!s:.80}")
        elif isinstance(value, list | tuple):
            for index, inner in enumerate(value):
                self.check_plain(inner, f"{position}[{index}]")
        elif not isinstance(value, PLAIN):
            raise self._error(position, "a plain value", value)

    def build(self, value: Any, kind: Any, position: str) -> Any:
        """Build one value.

        Args:
            value: A plain value from the file.
            kind: Annotation that the value must fit.
            position: Position in the description, for messages.

        Raises:
            ConfigurationError: The value does not fit, or names a class that is not trusted.
        """
        members = list(_members(kind))
        objects = [member for member in members if _is_class(member) or get_origin(member) is Callable]
        if any(_is_plain_of(value, member, maybe_class=bool(objects)) for member in members):
            return value
        if objects and (isinstance(value, str) or (isinstance(value, dict) and "class_path" in value)):
            return self._object(value, objects, position)
        for member in members:
            if isinstance(value, dict) and isinstance(member, type) and dataclasses.is_dataclass(member):
                return member(**self.arguments(member, value, position))
            if _is_container_of(value, member):
                return self._container(value, member, position)
        if Any in members:
            self.check_plain(value, position)
            return value
        raise self._error(position, " or ".join(_spelling(member) for member in members), value)

    def _object(self, value: str | dict, kinds: list[Any], position: str) -> Any:
        """Build the object that a value names; for the annotation ``Callable``, a function that builds it later."""
        spec: dict[str, Any] = {"class_path": value} if isinstance(value, str) else value
        if unknown := [key for key in spec if key not in KEYS]:
            raise ConfigurationError(f"{position}: unexpected {unknown[0]!r:.80} beside class_path and init_args")
        found = self.trusted.find(spec["class_path"])
        stored, more = spec.get("init_args") or {}, spec.get("dict_kwargs") or {}
        self.check_plain(more, position)
        if not isinstance(more, dict):
            raise self._error(f"{position}.dict_kwargs", "a dictionary of arguments", more)
        for kind in kinds:
            if _is_class(kind) and _makes(found, kind):
                return found(**self.arguments(found, stored, position), **more)
        for kind in kinds:
            if not _is_class(kind) and _makes(found, _result_of(kind)):
                arguments = {**self.arguments(found, stored, position, given=_count_of(kind)), **more}
                return functools.partial(found, **arguments) if arguments or isinstance(found, type) else found
        wanted = " or ".join(_spelling(kind) for kind in kinds)
        raise ConfigurationError(
            f"{position}: {self.trusted.origin} names {spec['class_path']}, which is not a {wanted}"
        )

    def _container(self, value: Any, kind: Any, position: str) -> Any:
        inner = get_args(kind)
        if isinstance(value, dict):
            of_values = inner[1] if len(inner) == 2 else Any
            if of_values is Any:  # check_plain needs the keys, because a key tells the kind of its value
                self.check_plain(value, position)
            return {key: self.build(item, of_values, f"{position}[{key!r:.80}]") for key, item in value.items()}
        if get_origin(kind) is tuple and inner and inner[-1] is not Ellipsis:
            if len(value) != len(inner):
                raise self._error(position, f"{len(inner)} values", value)
            return tuple(
                self.build(item, k, f"{position}[{i}]") for i, (item, k) in enumerate(zip(value, inner, strict=True))
            )
        items = [self.build(item, inner[0] if inner else Any, f"{position}[{i}]") for i, item in enumerate(value)]
        return tuple(items) if get_origin(kind) is tuple or kind is tuple else items

    def _error(self, position: str, wanted: str, value: Any) -> ConfigurationError:
        return ConfigurationError(f"{position}: expected {wanted}, got {value!r:.80}")


def parameters_of(owner: Callable) -> dict[str, inspect.Parameter]:
    """Return the parameters of a class or function by name, with the parameters that ``**kwargs`` passes on."""
    classes = inspect.getmro(owner) if isinstance(owner, type) else ()
    constructors = [vars(cls)["__init__"] for cls in classes if "__init__" in vars(cls)]
    found: dict[str, inspect.Parameter] = {}
    for function in constructors or [owner]:
        own = inspect.signature(function).parameters.values()
        try:
            hints = typing.get_type_hints(function)
        except (NameError, TypeError, AttributeError):  # an annotation with a name that exists for type checkers only
            hints = {}
        named = [p for p in own if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name != "self"]
        found = {**{p.name: p.replace(annotation=hints.get(p.name, Any)) for p in named}, **found}
        if not any(p.kind is p.VAR_KEYWORD for p in own):
            break
    return found


def missing_arguments(owner: Callable, given: Iterable[str]) -> list[str]:
    """Return the names of the parameters that have no default and are not given."""
    given = set(given)
    return [name for name, p in parameters_of(owner).items() if p.default is p.empty and name not in given]


def _members(kind: Any) -> Iterable[Any]:
    """Yield the members of an annotation that is a union, or the annotation itself; ``Any`` for a missing one."""
    if get_origin(kind) in (Union, UnionType):
        for member in get_args(kind):
            yield from _members(member)
    elif hasattr(kind, "__value__"):  # type X = ...
        yield from _members(kind.__value__)
    elif get_origin(kind) is typing.Annotated:
        yield from _members(get_args(kind)[0])
    elif isinstance(kind, TypeVar) or kind in (inspect.Parameter.empty, object):
        yield Any
    else:
        yield kind


def _is_plain_of(value: Any, kind: Any, maybe_class: bool) -> bool:
    """Tell whether a plain value fits an annotation. A string does not fit if it may be the name of a class."""
    if get_origin(kind) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(kind))
    if kind is float:
        return type(value) in (int, float)
    if isinstance(value, str):
        return kind in (str, Path) and not maybe_class
    return kind in PLAIN and type(value) is kind


def _is_container_of(value: Any, kind: Any) -> bool:
    origin = get_origin(kind) or kind
    if isinstance(value, dict):
        return origin in (dict, Mapping)
    return isinstance(value, list | tuple) and origin in (list, tuple, Sequence, Iterable)


def _is_class(kind: Any) -> bool:
    """Tell whether an annotation is a class, but not a class of plain values or containers."""
    return isinstance(kind, type) and get_origin(kind) is None and kind not in (*PLAIN, Path, dict, list, tuple, Any)


def _result_of(kind: Any) -> Any:
    return get_args(kind)[1] if get_args(kind) else object


def _count_of(kind: Any) -> int:
    given = get_args(kind)[0] if get_args(kind) else ()
    return len(given) if isinstance(given, list) else 0


def _makes(found: Any, kind: Any) -> bool:
    """Tell whether a call of a class, or of an allowed function, returns an object of a kind."""
    if isinstance(found, type):
        return not isinstance(kind, type) or issubclass(found, kind)
    return callable(found)


def _spelling(kind: Any) -> str:
    kind = _result_of(kind) if get_origin(kind) is Callable else kind
    return kind.__name__ if isinstance(kind, type) and get_origin(kind) is None else str(kind).replace("typing.", "")
