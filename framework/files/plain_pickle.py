"""A pickle read as a description: an interpreter of a few dozen instructions that imports and calls nothing."""

import struct
from collections.abc import Callable
from typing import Any

MOST_INSTRUCTIONS = 2_000_000
"""What a checkpoint's pickle has at most, beside those for each tensor: seconds of reading."""

_MARK = object()
_LARGEST_KEY = 1 << 53
_LONGEST_NAME = 400
_ROOM, _SMALL = 4, 1 << 20
_SIZED = (str, bytes, list, tuple, dict, set)
_CONSTANTS: dict[int, Any] = {ord("N"): None, 0x88: True, 0x89: False}
_NEW: dict[int, type] = {ord("}"): dict, ord("]"): list, ord(")"): tuple, 0x8F: set}
_FIXED = {ord("K"): "<B", ord("M"): "<H", ord("J"): "<i", ord("G"): ">d"}
_FORMATS = {code: struct.Struct(form) for code, form in _FIXED.items()}
_TEXTS = {ord("X"): "<I", 0x8C: "<B", 0x8D: "<Q"}
_BYTES = {ord("B"): "<I", ord("C"): "<B", 0x8E: "<Q"}
_LENGTHS = {code: struct.Struct(form) for code, form in {**_TEXTS, **_BYTES, 0x8A: "<B"}.items()}
_TUPLES = {0x85: 1, 0x86: 2, 0x87: 3}


class Foreign:
    """Stands for what a pickle names and nobody here has asked for: it was neither imported nor called."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *arguments: Any) -> "Foreign":
        """Return what it would have made, as foreign as itself."""
        return self


class Interpreter:
    """Builds what a pickle describes from plain values and from what ``known`` makes of the names in it.

    The memory is in proportion to the bytes of the pickle. An instruction makes nothing larger than what it is given,
    and what is given to names again and again is counted each time.

    Args:
        data: The pickle.
        known: Returns what a name (module, name) stands for, called with the arguments that the pickle has for it.
        persistent: Returns what a persistent id, as torch writes for a storage, stands for.
        build: Gives an object its state; by default no object takes any.
        plain_key: Tells whether something may be the key of a dictionary. By default strings and integers alone, whose
            hashes cost nothing.
        most: Instructions that are carried out at most.

    Raises:
        ValueError: If an instruction is unknown, has nothing to work on, or is one too many.
    """

    def __init__(
        self,
        data: bytes,
        known: Callable[[str, str], Any],
        persistent: Callable[[Any], Any] | None = None,
        build: Callable[[Any, Any], None] | None = None,
        plain_key: Callable[[Any], bool] | None = None,
        most: int = MOST_INSTRUCTIONS,
    ) -> None:
        self._data, self._at, self._most = data, 0, most
        self._known, self._persistent, self._build, self._plain_key = known, persistent, build, plain_key
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._room = _ROOM * len(data) + _SMALL

    def run(self) -> Any:
        """Return the object."""
        names = {code: getattr(self, name) for code, name in _STEPS.items()}
        data, stack, steps = self._data, self._stack, 0
        try:
            while True:
                code = data[self._at]
                self._at += 1
                steps += 1
                if steps > self._most:
                    raise ValueError(f"it has more than {self._most:,} values")
                if code == 0x2E:  # STOP
                    (result,) = stack
                    return result
                if code in _CONSTANTS:
                    stack.append(_CONSTANTS[code])
                elif code in _NEW:
                    stack.append(_NEW[code]())
                elif code == 0x28:  # MARK
                    stack.append(_MARK)
                elif code == 0x4B:  # BININT1
                    stack.append(data[self._at])
                    self._at += 1
                elif code in names:
                    names[code](code)
                else:
                    raise ValueError(f"its byte {self._at - 1} ({code:#x}) is no instruction of a description")
        except (IndexError, TypeError, struct.error, AttributeError, UnicodeDecodeError) as error:
            raise ValueError("its description is cut or garbled") from error

    def _take(self, size: int) -> bytes:
        if size > len(self._data) - self._at:
            raise ValueError("its description is cut or garbled")
        self._at += size
        return self._data[self._at - size : self._at]

    def _line(self) -> str:
        end = self._data.find(b"\n", self._at)
        if end < 0:
            raise ValueError("its description is cut or garbled")
        return (self._take(end + 1 - self._at)[:-1]).decode()

    def _pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise ValueError("its description is cut or garbled")
        return value

    def _above_mark(self) -> list[Any]:
        stack = self._stack
        at = len(stack) - 1
        while stack[at] is not _MARK:
            if at == 0:
                raise IndexError
            at -= 1
        values = stack[at + 1 :]
        del stack[at:]
        return values

    def _skip(self, code: int) -> None:
        self._take(1 if code == 0x80 else 8)

    def _number(self, code: int) -> None:
        form = _FORMATS[code]
        self._stack.append(form.unpack(self._take(form.size))[0])

    def _string(self, code: int) -> None:
        form = _LENGTHS[code]
        found = self._take(form.unpack(self._take(form.size))[0])
        if code in _TEXTS:
            self._stack.append(found.decode("utf-8", "surrogatepass"))
        else:
            self._stack.append(int.from_bytes(found, "little", signed=True) if code == 0x8A else found)

    def _tuple(self, code: int) -> None:
        if code == 0x74:
            values = self._above_mark()
        else:
            values = [self._pop() for _ in range(_TUPLES[code])][::-1]
        self._stack.append(tuple(values))

    def _append(self, code: int) -> None:
        values = [self._pop()] if code == 0x61 else self._above_mark()
        target = self._stack[-1]
        if type(target) is not list:
            raise ValueError("its description is cut or garbled")
        target.extend(values)

    def _add(self, code: int) -> None:
        values, target = self._above_mark(), self._stack[-1]
        if type(target) is not set:
            raise ValueError("its description is cut or garbled")
        target.update(self._key(value) for value in values)

    def _set(self, code: int) -> None:
        values = [self._pop(), self._pop()][::-1] if code == 0x73 else self._above_mark()
        target = self._stack[-1]
        if not isinstance(target, dict) or len(values) % 2:
            raise ValueError("its description is cut or garbled")
        for key, value in zip(values[::2], values[1::2], strict=True):
            target[self._key(key)] = value

    def _key(self, key: Any) -> Any:
        plain = type(key) is str or (isinstance(key, int) and abs(key) < _LARGEST_KEY)
        if not plain and not (self._plain_key is not None and self._plain_key(key)):
            kind = key.name if isinstance(key, Foreign) else type(key).__name__
            raise ValueError(f"a dictionary has a {kind} as a key; there are strings and integers below 2^53 alone")
        return key

    def _global(self, code: int) -> None:
        if code == 0x63:
            module, name = self._line(), self._line()
        else:
            name, module = self._pop(), self._pop()
        if not isinstance(module, str) or not isinstance(name, str) or len(module) + len(name) > _LONGEST_NAME:
            raise ValueError("its description is cut or garbled")
        self._stack.append(self._known(module, name))

    def _call(self, code: int) -> None:
        arguments, made = self._pop(), self._pop()
        if not isinstance(arguments, tuple) or not callable(made):
            raise ValueError("its description is cut or garbled")
        self._room -= sum(len(argument) for argument in arguments if isinstance(argument, _SIZED))
        if self._room < 0:
            raise ValueError("shared parts make it expand far beyond the size of the file")
        self._stack.append(made(*arguments))

    def _state(self, code: int) -> None:
        state, target = self._pop(), self._stack[-1]
        if isinstance(target, Foreign):
            return
        if self._build is None:
            raise ValueError(f"it gives a state to a {type(target).__name__}, which has none")
        self._build(target, state)

    def _put(self, code: int) -> None:
        if code == 0x94:
            number = len(self._memo)
        else:
            number = self._data[self._at] if code == 0x71 else struct.unpack_from("<I", self._data, self._at)[0]
            self._at += 1 if code == 0x71 else 4
        if self._stack[-1] is _MARK:
            raise ValueError("its description is cut or garbled")
        if number > len(self._data):
            raise ValueError(f"it numbers an object {number} in {len(self._data)} bytes")
        self._memo[number] = self._stack[-1]

    def _get(self, code: int) -> None:
        number = self._data[self._at] if code == 0x68 else struct.unpack_from("<I", self._data, self._at)[0]
        self._at += 1 if code == 0x68 else 4
        if number not in self._memo:
            raise ValueError("its description is cut or garbled")
        self._stack.append(self._memo[number])

    def _persist(self, code: int) -> None:
        if self._persistent is None:
            raise ValueError("it refers to a storage, which is not there")
        self._stack.append(self._persistent(self._pop()))


_STEPS = {
    0x80: "_skip", 0x95: "_skip", 0x74: "_tuple", 0x61: "_append", 0x65: "_append", 0x90: "_add", 0x73: "_set",
    0x75: "_set", 0x63: "_global", 0x93: "_global", 0x52: "_call", 0x81: "_call", 0x62: "_state", 0x71: "_put",
    0x72: "_put", 0x94: "_put", 0x68: "_get", 0x6A: "_get", 0x51: "_persist",
    **dict.fromkeys(_FORMATS, "_number"), **dict.fromkeys(_LENGTHS, "_string"), **dict.fromkeys(_TUPLES, "_tuple"),
}  # fmt: skip
"""Instruction -> the method that carries it out."""
