"""Turning jsonargparse's tree of attempts into one line that names the thing, the value and what would work."""

import difflib
import inspect
import re
from collections.abc import Iterable

# A union reports every member it tried; these lines say what something is not, never why.
_NOISE = re.compile(r"^(Does not validate|Subtypes:|Errors:|Given value|Expected a <class 'NoneType'>|tip:|usage:)")
_OPTION = re.compile(r"(?:accept option|Option|unrecognized arguments:) '?([\w.-]+)'?")
_CLASS = re.compile(r"Expected a dot import path string: (\S+)")


def one_line(message: str, bases: Iterable[type] = (), options: Iterable[str] = ()) -> str:
    """Reduce a parser message to its most specific complaint, with the nearest known names.

    Args:
        message: What jsonargparse says.
        bases: Classes whose loaded subclasses a config may name.
        options: Command-line options that exist.
    """
    address = ".".join(re.findall(r'[Pp]arser key "([^"]+)"', message))
    lines = [(len(line) - len(line.lstrip(" -")), line.strip(" -")) for line in message.splitlines()]
    causes = [(depth, line) for depth, line in lines if line and not _NOISE.match(line) and "arser key" not in line]
    if not causes:
        return " ".join(message.split())
    # The first complaint at the greatest depth belongs to the first, most specific member of the union.
    cause = max(causes, key=lambda item: item[0])[1]
    classes = loaded_subclasses(bases)
    if match := _CLASS.search(cause):
        cause = f"unknown class {match.group(1)!r}{_near(match.group(1), [c.__name__ for c in classes])}"
    elif "did you mean" not in cause and (match := _OPTION.search(cause)):
        known = {*(o.removeprefix("--") for o in options), *(p for c in classes for p in _parameters(c))}
        cause += _near(match.group(1).removeprefix("--"), known)
    return f"{address}: {cause}" if address else cause


def loaded_subclasses(bases: Iterable[type]) -> list[type]:
    """Return the given classes and all their subclasses that have been imported."""
    found: dict[type, None] = {}
    pending = list(bases)
    while pending:
        cls = pending.pop()
        if cls not in found:
            found[cls] = None
            pending += cls.__subclasses__()
    return list(found)


def _parameters(cls: type) -> list[str]:
    try:
        return list(inspect.signature(cls).parameters)
    except (ValueError, TypeError):
        return []


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, sorted(set(known)), n=3, cutoff=0.6)
    return f"; did you mean {', '.join(near)}?" if near else ""
