"""Reduces an error of jsonargparse to one line that names the key, the value and what would work."""

import difflib
import inspect
import re
from collections.abc import Collection, Iterable

# jsonargparse reports every member of a union that it has tried. These lines never hold the cause.
_NO_CAUSE = re.compile(
    r"^(Does not validate|Subtypes:|Subclass types|Errors:|Given value|Expected a <class 'NoneType'>|tip:|usage:"
    r"|a class path \(str\)|a dict with)"
)
_OPTION = re.compile(r"(?:accept option|Option|unrecognized arguments:) '?([\w./-]+)'?")
_CLASS = re.compile(r"Expected a dot import path string: (\S+)")
_NO_CLASS = re.compile(r"Not a valid subclass of (\w+)")
_CALLABLE = re.compile(r"expects a function or a callable class: (.*?)(?:\. Got value|$)")
_ATTRIBUTE = re.compile(r"has no attribute '(\w+)'")
_TYPE = re.compile(r"^Expected a (?:<class '(?P<plain>\w+)'>|typing\.Literal\[(?P<words>.*?)\])")
_GIVEN = re.compile(r"(?:Given value: |Got value: )(.*)")
_REQUIRED = re.compile(r"arguments are required: (.*)")
_MOST_NAMES = 12


def one_line(message: str, bases: Collection[type] = (), options: Iterable[str] = ()) -> str:
    """Return the most specific line of a parser's message, with the known names nearest to a misspelt one.

    Args:
        message: The message of jsonargparse.
        bases: Classes whose loaded subclasses a config may name.
        options: All command-line options.
    """
    address = ".".join(re.findall(r'[Pp]arser key "([^"]+)"', message))
    lines = [(len(line) - len(line.lstrip(" -")), line.strip(" -")) for line in message.splitlines()]
    causes = [(depth, line) for depth, line in lines if line and not _NO_CAUSE.match(line) and "arser key" not in line]
    if not causes:
        return " ".join(message.split())
    # The first line at the greatest depth belongs to the first, most specific member of the union. A line that says
    # only that the value has another type than the member is the least specific.
    depth = max(depth for depth, _ in causes)
    deepest = [line for at, line in causes if at == depth]
    cause = next((line for line in deepest if not _TYPE.match(line)), deepest[0])
    classes = loaded_subclasses(bases)
    if _TYPE.match(cause):
        cause = _wrong_type(deepest, message)
    elif match := _CLASS.search(cause):
        cause = f"unknown class {match.group(1)!r}{_classes_hint(match.group(1), classes, bases)}"
    elif match := _NO_CLASS.search(cause):
        cause = _needs_class(match.group(1), classes)
    elif match := _CALLABLE.search(cause):
        attribute = _ATTRIBUTE.search(cause)
        near = _near(attribute.group(1), [c.__name__ for c in classes]) if attribute else ""
        cause = f"{match.group(1)}{near}"
    elif match := _REQUIRED.search(cause):
        names = re.sub(r"\b(fit|validate|test|predict)\.", "", match.group(1))
        cause = f"no {names.replace(', ', ' and no ')} given: name a config, such as -c pretrain/quickstart.yaml"
        cause += " (predict with --prompts needs none)" if "predict." in match.group(1) else ""
    elif "did you mean" not in cause and (match := _OPTION.search(cause)):
        cause += _option_hint(match.group(1), classes, options)
    return f"{address}: {cause}" if address else cause


def _wrong_type(lines: list[str], message: str) -> str:
    """Return the types of all members of a union, for a value that has none of them."""
    found: list[str] = []
    for match in filter(None, map(_TYPE.match, lines)):
        found += [match["plain"]] if match["plain"] else match["words"].replace("'", "").split(", ")
    given = _GIVEN.findall(message)
    text = f"expected {' or '.join(dict.fromkeys(found))}" + (f", got {given[-1]!r}" if given else "")
    if given and "str" in found and re.search(r"\b(True|False)\b", given[-1]):
        text += '; YAML reads words such as yes, no and on as true or false: put quotes around them ("yes")'
    if not given or given[-1] not in ("None", "none"):
        return text
    if "NoneType" in message:  # null is a member of the union
        return f"{text}; none is written null"
    return text.replace(f"got {given[-1]!r}", "got null; leave the option out for its default")


def _needs_class(base: str, classes: list[type]) -> str:
    """Return that a value must name a subclass of ``base``, with some of the known ones."""
    names = [c.__name__ for c in classes if base in (parent.__name__ for parent in c.__mro__[1:])]
    known = [name for name in dict.fromkeys(names) if not name.startswith("_")]
    return f"class_path must name a {base}" + (f", such as {', '.join(known[:6])}" if known else "")


def _classes_hint(name: str, classes: list[type], bases: Collection[type]) -> str:
    """Return the known classes with names near ``name``; without any, all known classes if they are few."""
    usable = (c for c in classes if c not in bases and not inspect.isabstract(c))
    names = {c.__name__ for c in usable if not c.__name__.startswith("_")}
    known = f"; known: {', '.join(sorted(names))}" if 0 < len(names) <= _MOST_NAMES else ""
    return _near(name, [c.__name__ for c in classes]) or known


def _option_hint(name: str, classes: list[type], options: Iterable[str]) -> str:
    if name.endswith((".yaml", ".yml")):
        return f"; a config is given as -c {name}"
    options = [option.removeprefix("--") for option in options if not option.endswith(".help")]
    known = {*options, *(p for c in classes for p in _parameters(c))}
    name = name.removeprefix("--")
    # of modl.class_path and --chekpoint.monitor only the first part is misspelt
    return _near(name, known) or _near(name.partition(".")[0], [option for option in options if "." not in option])


def loaded_subclasses(bases: Iterable[type]) -> list[type]:
    """Return the given classes and all their subclasses that have been imported so far."""
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
    near = difflib.get_close_matches(name, sorted({*known} - {name}), n=3, cutoff=0.6)
    return f"; did you mean {', '.join(near)}?" if near else ""
