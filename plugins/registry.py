"""The parameterizations by name: the built-in ones, those of this program, and those of installed packages.

A package offers a parameterization through the entry-point group ``orthotrain.parameterizations``. The package is
imported only when the name is looked up or all names are listed, so a broken package stops only the runs that use it.
"""

import difflib
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any, TypeVar

from orthotrain.plugins.base import Parameterization

ENTRY_POINT_GROUP = "orthotrain.parameterizations"

P = TypeVar("P", bound=type[Parameterization])

_registered: dict[str, type[Parameterization]] = {}


def register(name: str) -> Callable[[P], P]:
    """Class decorator that makes a ``Parameterization`` known under a name.

    Args:
        name: The short name used in configurations, such as ``"cayley_neumann"``.

    Raises:
        ValueError: The name is taken, the class has a name already, or it is no concrete subclass of
            ``Parameterization``.
    """

    def decorate(cls: P) -> P:
        if not _is_parameterization(cls):
            raise ValueError(f"cannot register {cls!r} as {name!r}: it is not a concrete subclass of Parameterization")
        if name in _registered:
            raise ValueError(f"parameterization {name!r} is already registered; known: {_listing(_registered)}")
        if cls.__dict__.get("registered_name"):
            raise ValueError(f"cannot register {cls.__name__} as {name!r}: it is already {cls.registered_name!r}")
        cls.registered_name = name
        _registered[name] = cls
        return cls

    return decorate


def known() -> dict[str, type[Parameterization]]:
    """Return every parameterization by name, in alphabetical order; imports those of installed packages.

    Raises:
        ValueError: A package's entry point is broken or takes a name that is in use.
    """
    for name in _entry_points():
        get(name)
    return dict(sorted(_registered.items()))


def get(name: str) -> type[Parameterization]:
    """Return the parameterization registered under ``name``, from an installed package if need be.

    Raises:
        ValueError: No such name (the message lists the known ones), or the entry point of that name is broken.
    """
    for entry_point in _entry_points().get(name, ()):
        _load(entry_point)
    if name not in _registered:
        raise ValueError(_unknown(name, [*_registered, *_entry_points()]))
    return _registered[name]


def create(spec: Parameterization | str | Mapping[str, Any]) -> Parameterization:
    """Build a parameterization from the value in a configuration or a checkpoint.

    Args:
        spec: A parameterization, returned as it is; or a name; or ``{"class_path": name, "init_args": {...}}``. A
            name is a registered name, the name of a registered class, or the dotted import path of a subclass of
            ``Parameterization``.

    Raises:
        ValueError: An unknown name, a path to something else, or arguments that the class does not accept.
    """
    if isinstance(spec, Parameterization):
        return spec
    if isinstance(spec, str):
        spec = {"class_path": spec}
    if not isinstance(spec, Mapping) or not isinstance(spec.get("class_path"), str):
        raise ValueError(f"a parameterization is a name or {{class_path: name, init_args: {{...}}}}, got {spec!r}")
    if excess := set(spec) - {"class_path", "init_args"}:
        raise ValueError(f"{spec['class_path']}: unexpected {_listing(excess)} beside class_path and init_args")
    cls = _resolve(spec["class_path"])
    arguments = spec.get("init_args") or {}
    _check_arguments(cls, arguments)
    return cls(**arguments)


def find_registered(path: str) -> type[Parameterization] | None:
    """Return the registered parameterization of a name, a class name or a dotted path; None if none is registered.

    Nothing is imported but the entry points of installed packages.

    Raises:
        ValueError: A class name that several parameterizations have, or a broken entry point.
    """
    if path in _registered or path in _entry_points():
        return get(path)
    module_name, _, class_name = path.rpartition(".")
    # a package may offer a class under another module than the one that defines the class
    public = getattr(sys.modules.get(module_name), class_name, None) if module_name else None
    matches = [c for c in known().values() if c is public or path in (c.__name__, f"{c.__module__}.{c.__qualname__}")]
    if len(matches) > 1:
        raise ValueError(f"{path!r} is ambiguous, use a name: {_listing(cls.registered_name for cls in matches)}")
    return matches[0] if matches else None


def _resolve(path: str) -> type[Parameterization]:
    """Return the class of a registered name, of the name of a registered class, or of a dotted path."""
    module_name, _, class_name = path.rpartition(".")
    if (found := find_registered(path)) is not None:
        return found
    if not module_name:
        raise ValueError(_unknown(path, [*known(), *(cls.__name__ for cls in known().values())]))
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot import parameterization {path!r}: {error}") from error
    if not _is_parameterization(cls):
        raise ValueError(f"{path!r} is not a concrete subclass of orthotrain.plugins.Parameterization")
    return cls


def _is_parameterization(cls: Any) -> bool:
    return isinstance(cls, type) and issubclass(cls, Parameterization) and not inspect.isabstract(cls)


def _check_arguments(cls: type[Parameterization], arguments: Any) -> None:
    """Raise one ValueError that names the class, the offending argument and the accepted ones."""
    signature = inspect.signature(cls)
    accepted = f"accepted: {', '.join(map(str, signature.parameters.values())) or 'none'}"
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{cls.__name__}: init_args must be a mapping of arguments, got {arguments!r}; {accepted}")
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ValueError(f"{cls.__name__}: {error}; {accepted}") from None


@functools.cache
def _entry_points() -> dict[str, list[metadata.EntryPoint]]:
    """Return the entry points of our group by name, none of them imported yet."""
    found: dict[str, list[metadata.EntryPoint]] = {}
    for entry_point in metadata.entry_points(group=ENTRY_POINT_GROUP):
        found.setdefault(entry_point.name, []).append(entry_point)
    return found


def _load(entry_point: metadata.EntryPoint) -> None:
    """Import and register one entry point, whose class may or may not carry ``@register`` itself."""
    try:
        cls = entry_point.load()
        if _registered.get(entry_point.name) is not cls:
            register(entry_point.name)(cls)
    except Exception as error:
        package = entry_point.dist.name if entry_point.dist else "an unknown distribution"
        broken = f"entry point {entry_point.name!r} ({entry_point.value}) of {package} is broken"
        raise ValueError(f"{broken}: {type(error).__name__}: {error}") from error


def _unknown(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    suggestion = f" (did you mean {close[0]!r}?)" if close else ""
    return f"unknown parameterization {name!r}{suggestion}; known: {_listing(names)}"


def _listing(names: Any) -> str:
    return ", ".join(sorted(set(map(str, names))))
