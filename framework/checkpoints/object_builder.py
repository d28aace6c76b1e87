"""Building objects from the description that a checkpoint stores.

A description is made of plain values: ``{"class_path": name, "init_args": {...}}`` for an object, and a dictionary for
settings. The constructor's annotations decide what each value has to be. No string is parsed again, so a string never
becomes a dictionary, a file or an address; a class is found by :class:`TrustedClasses` alone.
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
"""What the description of an object consists of; ``dict_kwargs`` holds what a constructor takes by ``**kwargs``."""

PLAIN = (bool, int, float, str, type(None))


class ObjectBuilder:
    """Builds what one checkpoint describes.

    Args:
        trusted: The classes that the checkpoint may name.
    """

    def __init__(self, trusted: TrustedClasses) -> None:
        self.trusted = trusted

    def arguments(self, owner: Callable, stored: object, place: str, given: int = 0) -> dict[str, Any]:
        """Build the arguments of a class or function.

        Args:
            owner: The class or function.
            stored: Argument names -> plain values, from the file.
            place: Where in the description they stand, for messages.
            given: How many of the first arguments somebody else will give.

        Raises:
            ConfigurationError: For an argument that ``owner`` does not have, or a value that does not fit it.
        """
        if not isinstance(stored, dict):
            raise self._error(place, "a dictionary of arguments", stored)
        kinds = dict(list(parameters_of(owner).items())[given:])
        for name, value in stored.items():
            if name not in kinds:
                known = ", ".join(kinds) or "none"
                raise ConfigurationError(f"{place}: {owner.__name__} has no argument {name!r:.80}; known: {known}")
            self.trusted.check_argument(name, value, place)
        return {name: self.build(value, kinds[name].kind, f"{place}.{name}") for name, value in stored.items()}

    def check_plain(self, value: Any, place: str) -> None:
        """Refuse, anywhere in nested plain values, the name of a class that is not trusted, and what is not plain.

        Called before anything is built, and for values that this class only passes on: others may look up names there.

        Args:
            value: From the file.
            place: Where in the description it stands, for messages.

        Raises:
            ConfigurationError: Naming the class or the value.
        """
        if isinstance(value, dict):
            for key, inner in value.items():
                if key == "class_path" or (key == "parameterization" and isinstance(inner, str)):
                    self.trusted.check(inner)
                self.trusted.check_argument(str(key), inner, place)
                self.check_plain(inner, f"{place}.{key!s:.80}")
        elif isinstance(value, list | tuple):
            for position, inner in enumerate(value):
                self.check_plain(inner, f"{place}[{position}]")
        elif not isinstance(value, PLAIN):
            raise self._error(place, "a plain value", value)

    def build(self, value: Any, kind: Any, place: str) -> Any:
        """Build one value.

        Args:
            value: Plain, from the file.
            kind: The annotation that it has to fit.
            place: Where in the description it stands, for messages.

        Raises:
            ConfigurationError: If the value does not fit, or names a class that is not trusted.
        """
        members = list(_members(kind))
        objects = [member for member in members if _is_object(member)]
        if any(_is_plain_of(value, member, maybe_class=bool(objects)) for member in members):
            return value
        if objects and (isinstance(value, str) or (isinstance(value, dict) and "class_path" in value)):
            return self._object(value, objects, place)
        for member in members:
            if isinstance(value, dict) and isinstance(member, type) and dataclasses.is_dataclass(member):
                return member(**self.arguments(member, value, place))
            if _is_container_of(value, member):
                return self._container(value, member, place)
        if Any in members:
            self.check_plain(value, place)
            return value
        raise self._error(place, " or ".join(_spelling(member) for member in members), value)

    def _object(self, value: str | dict, kinds: list[Any], place: str) -> Any:
        """Build the object that a value names, or what builds it later where the annotation is a ``Callable``."""
        spec: dict[str, Any] = {"class_path": value} if isinstance(value, str) else value
        if unknown := [key for key in spec if key not in KEYS]:
            raise ConfigurationError(f"{place}: unexpected {unknown[0]!r:.80} beside class_path and init_args")
        found = self.trusted.find(spec["class_path"])
        stored, more = spec.get("init_args") or {}, spec.get("dict_kwargs") or {}
        self.check_plain(more, place)
        if not isinstance(more, dict):
            raise self._error(f"{place}.dict_kwargs", "a dictionary of arguments", more)
        for kind in kinds:
            if _is_class(kind) and _makes(found, kind):
                return found(**self.arguments(found, stored, place), **more)
        for kind in kinds:
            if not _is_class(kind) and _makes(found, _result_of(kind)):
                arguments = {**self.arguments(found, stored, place, given=_count_of(kind)), **more}
                return functools.partial(found, **arguments) if arguments or isinstance(found, type) else found
        wanted = " or ".join(_spelling(kind) for kind in kinds)
        raise ConfigurationError(f"{place}: {self.trusted.origin} names {spec['class_path']}, which is no {wanted}")

    def _container(self, value: Any, kind: Any, place: str) -> Any:
        inner = get_args(kind)
        if isinstance(value, dict):
            of_values = inner[1] if len(inner) == 2 else Any
            if of_values is Any:  # the keys say what the values are
                self.check_plain(value, place)
            return {key: self.build(item, of_values, f"{place}[{key!r:.80}]") for key, item in value.items()}
        if get_origin(kind) is tuple and inner and inner[-1] is not Ellipsis:
            if len(value) != len(inner):
                raise self._error(place, f"{len(inner)} values", value)
            return tuple(
                self.build(item, k, f"{place}[{i}]") for i, (item, k) in enumerate(zip(value, inner, strict=True))
            )
        items = [self.build(item, inner[0] if inner else Any, f"{place}[{i}]") for i, item in enumerate(value)]
        return tuple(items) if get_origin(kind) is tuple or kind is tuple else items

    def _error(self, place: str, wanted: str, value: Any) -> ConfigurationError:
        return ConfigurationError(f"{place}: expected {wanted}, got {value!r:.80}")


@dataclasses.dataclass(frozen=True)
class Taken:
    """One argument that a class or function takes: its annotation, and whether a call has to give it."""

    kind: Any
    needed: bool


def parameters_of(owner: Callable) -> dict[str, Taken]:
    """Return what a class or function takes by name, arguments that ``**kwargs`` passes on to a parent included."""
    if not isinstance(owner, type):
        return _taken(owner)[0]
    found: dict[str, Taken] = {}
    for cls in inspect.getmro(owner):
        if "__init__" not in cls.__dict__:
            continue
        own, passes_on = _taken(cls.__dict__["__init__"])
        found = {**{name: taken for name, taken in own.items() if name != "self"}, **found}
        if not passes_on:
            break
    return found


def missing_arguments(owner: Callable, given: Iterable[str]) -> list[str]:
    """Return the arguments without a default that are not given."""
    given = set(given)
    return [name for name, taken in parameters_of(owner).items() if taken.needed and name not in given]


def _taken(function: Callable) -> tuple[dict[str, Taken], bool]:
    """Return the arguments by name, and whether the function takes ``**kwargs``."""
    parameters = inspect.signature(function).parameters.values()
    try:
        hints = typing.get_type_hints(function)
    except (NameError, TypeError, AttributeError):  # a name that exists for type checkers only
        hints = {}
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    taken = {p.name: Taken(hints.get(p.name, Any), p.default is p.empty) for p in named}
    return taken, any(p.kind is p.VAR_KEYWORD for p in parameters)


def _members(kind: Any) -> Iterable[Any]:
    """Yield the members of a union; of an annotation that says nothing, ``Any``."""
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
    """Tell whether a plain value fits; a string does not where it may be the name of a class, which is looked up."""
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
    """Tell whether an annotation is a class of objects, and not of plain values or containers."""
    return isinstance(kind, type) and get_origin(kind) is None and kind not in (*PLAIN, Path, dict, list, tuple, Any)


def _is_object(kind: Any) -> bool:
    return _is_class(kind) or get_origin(kind) is Callable


def _result_of(kind: Any) -> Any:
    return get_args(kind)[1] if get_args(kind) else object


def _count_of(kind: Any) -> int:
    given = get_args(kind)[0] if get_args(kind) else ()
    return len(given) if isinstance(given, list) else 0


def _makes(found: Any, kind: Any) -> bool:
    """Tell whether calling a class, or an allowed function, gives an object of a kind."""
    if isinstance(found, type):
        return not isinstance(kind, type) or issubclass(found, kind)
    return callable(found)


def _spelling(kind: Any) -> str:
    kind = _result_of(kind) if get_origin(kind) is Callable else kind
    return kind.__name__ if isinstance(kind, type) and get_origin(kind) is None else str(kind).replace("typing.", "")
