"""Mutations of parsed values for hypothesis: types, strings, nesting, keys; never of bytes."""

import copy
import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

ODD = [
    None, True, -1, 0, 1 << 31, 1 << 70, 0.5, float("nan"), float("inf"), "", "x", "antigravity.fly", "this.d",
    "trap_module.Network", "os.system", "../../canary/a.txt", "https://127.0.0.1:9/", "file:///dev/zero",
    "\x1b]0;owned\x07", "a\0b", "\u202e", [], [[]], {}, {"class_path": "trap_module.Network"},
    {"class_path": "os.abort",
    "init_args": {}},
    {"trust_remote_code": True}, '{"class_path": "antigravity.fly"}', "!!python/name:os.system", "9" * 400,
]  # fmt: skip
CLASSES = [
    '{"class_path": "antigravity.fly"}', '{"class_path": "trap_module.Network", "init_args": {}}',
    "trap_module.Network",
    "class_path: antigravity.fly", {"class_path": "antigravity.fly"}, {"class_path": "this.d", "init_args.x": 1},
]  # fmt: skip
"""What replaces the description of a class."""
KEYS = [
    "class_path",
    "init_args",
    "dict_kwargs",
    "trust_remote_code",
    "auto_map",
    "__class__",
    "_instantiator",
    "init_args.x",
    "config",
    "",
    "\x1b[2J",
    "quantization_config",
]
OPERATIONS = (
    "replace",
    "delete",
    "duplicate",
    "as json",
    "as list",
    "as dictionary",
    "other type",
    "add a key",
    "swap",
)


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Every place in nested dictionaries and lists."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in inner:
        yield (*path, key)
        yield from places(child, (*path, key))


def holder_of(value: Any, path: tuple) -> Any:
    """Return what holds the value at a place."""
    for key in path[:-1]:
        value = value[key]
    return value


def other_type(value: Any) -> Any:
    """Return about the same as another type."""
    if isinstance(value, str):
        return int(value) if value.isdigit() else list(value)
    if isinstance(value, list):
        return dict(enumerate(value)) if not all(isinstance(v, str) for v in value) else dict.fromkeys(value)
    if isinstance(value, dict):
        return [[key, inner] for key, inner in value.items()]
    return str(value)


def _describes(value: Any) -> bool:
    return isinstance(value, dict) and "class_path" in value


def changed(draw: Any, value: Any) -> None:
    """Change one place of nested plain values."""
    found = list(places(value)) or [()]
    classes = [path for path in found if path and _describes(holder_of(value, path)[path[-1]])]
    if classes and draw(st.integers(0, 2)) == 0:
        path = draw(st.sampled_from(classes))
        holder_of(value, path)[path[-1]] = copy.deepcopy(draw(st.sampled_from(CLASSES)))
        return
    path = draw(st.sampled_from(found))
    if not path:
        return
    holder, key, operation = holder_of(value, path), path[-1], draw(st.sampled_from(OPERATIONS))
    old = holder[key]
    if operation == "replace":
        holder[key] = copy.deepcopy(draw(st.sampled_from(ODD)))
    elif operation == "delete":
        del holder[key]
    elif operation == "duplicate":
        if isinstance(holder, list):
            holder.insert(key, copy.deepcopy(old))
        else:
            holder[f"{key}2"] = copy.deepcopy(old)
    elif operation == "as json":
        holder[key] = json.dumps(old, default=str)
    elif operation == "as list":
        holder[key] = [old]
    elif operation == "as dictionary":
        holder[key] = {draw(st.sampled_from(KEYS)): old}
    elif operation == "other type":
        holder[key] = other_type(old)
    elif operation == "swap":
        other = draw(st.sampled_from(list(places(value))))
        holder[key] = copy.deepcopy(holder_of(value, other)[other[-1]])
    elif isinstance(old, dict):
        old[draw(st.sampled_from(KEYS))] = copy.deepcopy(draw(st.sampled_from(ODD)))
    else:
        holder[key] = {draw(st.sampled_from(KEYS)): copy.deepcopy(draw(st.sampled_from(ODD)))}


@st.composite
def mutated(draw: Any, value: Any) -> Any:
    """Nested plain values with one to three changes."""
    value = {"": copy.deepcopy(value)}  # the outermost value has a place too
    for _ in range(draw(st.integers(1, 3))):
        changed(draw, value)
    return value.get("")
