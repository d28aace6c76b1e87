"""Interpreter of pickles that imports nothing, and calls nothing but the functions that it is given."""

import pickle
import struct
from collections.abc import Callable
from typing import Any

MOST_INSTRUCTIONS = 2_000_000
"""Most instructions in the pickle of a checkpoint, not counting those for its tensors. Reading them takes seconds."""

_MARK = object()
_LARGEST_KEY = 1 << 53
_LONGEST_NAME = 400
_SIZED = (str, bytes, list, tuple, dict, set)

_STOP, _MARK_CODE, _SMALL_INTEGER = pickle.STOP[0], pickle.MARK[0], pickle.BININT1[0]
_CONSTANTS: dict[int, Any] = {pickle.NONE[0]: None, pickle.NEWTRUE[0]: True, pickle.NEWFALSE[0]: False}
_EMPTY: dict[int, type] = {
    pickle.EMPTY_DICT[0]: dict, pickle.EMPTY_LIST[0]: list, pickle.EMPTY_TUPLE[0]: tuple, pickle.EMPTY_SET[0]: set,
}  # fmt: skip
_OPERANDS = {pickle.TUPLE1[0]: 1, pickle.TUPLE2[0]: 2, pickle.TUPLE3[0]: 3, pickle.APPEND[0]: 1, pickle.SETITEM[0]: 2}
_BYTE, _WORD, _LONG = struct.Struct("<B"), struct.Struct("<I"), struct.Struct("<Q")
_NUMBERS = {
    pickle.BININT2[0]: struct.Struct("<H"),
    pickle.BININT[0]: struct.Struct("<i"),
    pickle.BINFLOAT[0]: struct.Struct(">d"),
}
_TEXTS = {pickle.SHORT_BINUNICODE[0]: _BYTE, pickle.BINUNICODE[0]: _WORD, pickle.BINUNICODE8[0]: _LONG}
_BYTES = {pickle.SHORT_BINBYTES[0]: _BYTE, pickle.BINBYTES[0]: _WORD, pickle.BINBYTES8[0]: _LONG}
_LENGTHS = {**_TEXTS, **_BYTES, pickle.LONG1[0]: _BYTE}
_MEMO_INDEXES = {
    pickle.BINPUT[0]: _BYTE, pickle.LONG_BINPUT[0]: _WORD, pickle.BINGET[0]: _BYTE, pickle.LONG_BINGET[0]: _WORD,
}  # fmt: skip


class UnknownName:
    """Stands for a name in a pickle that the reader does not know. The name is neither imported nor called."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *arguments: Any) -> "UnknownName":
        """Return itself: the result of an unknown function is unknown too."""
        return self


def require(condition: object) -> None:
    """Refuse a pickle in which a condition does not hold that every intact pickle of torch fulfils.

    Raises:
        ValueError: The condition is false.
    """
    if not condition:
        raise ValueError("its pickle is truncated or damaged")


class Interpreter:
    """Builds the object of a pickle from plain values, and from what ``known`` returns for the names in the pickle.

    The memory is proportional to the size of the pickle: no instruction creates anything larger than its operands, and
    the total size of all arguments of calls is limited.

    Args:
        data: The pickle.
        known: Takes a module and a name; returns a function that is called with the arguments in the pickle.
        persistent: Takes a persistent id, which torch writes for a storage; returns the object for it.
        set_state: Takes an object and its state, and sets the state. By default no object can have a state.
        is_key: Tells whether an object may be the key of a dictionary. By default only strings and integers may,
            because to hash them is cheap.
        most: Most instructions to execute.

    Raises:
        ValueError: An instruction is unknown or has no operands, or there are too many instructions.
    """

    def __init__(
        self,
        data: bytes,
        known: Callable[[str, str], Any],
        persistent: Callable[[Any], Any] | None = None,
        set_state: Callable[[Any, Any], None] | None = None,
        is_key: Callable[[Any], bool] = lambda key: False,
        most: int = MOST_INSTRUCTIONS,
    ) -> None:
        self._data, self._position, self._most = data, 0, most
        self._known, self._persistent, self._set_object_state, self._is_key = known, persistent, set_state, is_key
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._argument_budget = 4 * len(data) + (1 << 20)

    def run(self) -> Any:
        """Execute the pickle and return its object."""
        methods = {code: getattr(self, name) for code, name in _METHODS.items()}
        data, stack = self._data, self._stack
        try:
            for _ in range(self._most):
                code = data[self._position]
                self._position += 1
                if code == _STOP:
                    (result,) = stack
                    return result
                if code in _CONSTANTS:
                    stack.append(_CONSTANTS[code])
                elif code in _EMPTY:
                    stack.append(_EMPTY[code]())
                elif code == _MARK_CODE:
                    stack.append(_MARK)
                elif code == _SMALL_INTEGER:
                    stack.append(data[self._position])
                    self._position += 1
                elif code in methods:
                    methods[code](code)
                else:
                    raise ValueError(
                        f"its byte {self._position - 1} ({code:#x}) is an instruction that torch never writes"
                    )
        except (IndexError, TypeError, struct.error, AttributeError, UnicodeDecodeError) as error:
            raise ValueError("its pickle is truncated or damaged") from error
        raise ValueError(f"it has more than {self._most:,} values")

    def _take(self, size: int) -> bytes:
        require(size <= len(self._data) - self._position)
        self._position += size
        return self._data[self._position - size : self._position]

    def _unpack(self, form: struct.Struct) -> Any:
        return form.unpack(self._take(form.size))[0]

    def _line(self) -> str:
        end = self._data.find(b"\n", self._position)
        require(end >= 0)
        return (self._take(end + 1 - self._position)[:-1]).decode()

    def _pop(self) -> Any:
        value = self._stack.pop()
        require(value is not _MARK)
        return value

    def _operands(self, code: int) -> list[Any]:
        """Remove a fixed number of values from the stack, or all values above the last mark, and return them."""
        if code in _OPERANDS:
            return [self._pop() for _ in range(_OPERANDS[code])][::-1]
        stack = self._stack
        mark = len(stack) - 1
        while stack[mark] is not _MARK:
            require(mark > 0)
            mark -= 1
        values = stack[mark + 1 :]
        del stack[mark:]
        return values

    def _skip(self, code: int) -> None:
        self._take(1 if code == pickle.PROTO[0] else 8)

    def _number(self, code: int) -> None:
        self._stack.append(self._unpack(_NUMBERS[code]))

    def _string(self, code: int) -> None:
        found = self._take(self._unpack(_LENGTHS[code]))
        if code in _TEXTS:
            self._stack.append(found.decode("utf-8", "surrogatepass"))
        else:
            self._stack.append(found if code in _BYTES else int.from_bytes(found, "little", signed=True))

    def _tuple(self, code: int) -> None:
        self._stack.append(tuple(self._operands(code)))

    def _append(self, code: int) -> None:
        values, target = self._operands(code), self._stack[-1]
        require(type(target) is list)
        target.extend(values)

    def _add_to_set(self, code: int) -> None:
        values, target = self._operands(code), self._stack[-1]
        require(type(target) is set)
        target.update(self._key(value) for value in values)

    def _set_items(self, code: int) -> None:
        values, target = self._operands(code), self._stack[-1]
        require(isinstance(target, dict) and len(values) % 2 == 0)
        for key, value in zip(values[::2], values[1::2], strict=True):
            target[self._key(key)] = value

    def _key(self, key: Any) -> Any:
        if not (type(key) is str or (isinstance(key, int) and abs(key) < _LARGEST_KEY) or self._is_key(key)):
            kind = key.name if isinstance(key, UnknownName) else type(key).__name__
            raise ValueError(f"a dictionary has a {kind} as a key; only strings and integers below 2^53 are read")
        return key

    def _global(self, code: int) -> None:
        if code == pickle.GLOBAL[0]:
            module, name = self._line(), self._line()
        else:
            name, module = self._pop(), self._pop()
        require(isinstance(module, str) and isinstance(name, str) and len(module) + len(name) <= _LONGEST_NAME)
        self._stack.append(self._known(module, name))

    def _call(self, code: int) -> None:
        arguments, function = self._pop(), self._pop()
        require(isinstance(arguments, tuple) and callable(function))
        self._argument_budget -= sum(len(argument) for argument in arguments if isinstance(argument, _SIZED))
        if self._argument_budget < 0:
            raise ValueError("its shared parts expand to far more than the size of the file")
        self._stack.append(function(*arguments))

    def _set_state(self, code: int) -> None:
        state, target = self._pop(), self._stack[-1]
        if isinstance(target, UnknownName):
            return
        if self._set_object_state is None:
            raise ValueError(f"it sets a state on a {type(target).__name__}, which has none")
        self._set_object_state(target, state)

    def _put(self, code: int) -> None:
        index = self._unpack(_MEMO_INDEXES[code]) if code in _MEMO_INDEXES else len(self._memo)
        require(self._stack[-1] is not _MARK)
        if index > len(self._data):
            raise ValueError(f"it gives an object the number {index} in {len(self._data)} bytes")
        self._memo[index] = self._stack[-1]

    def _get(self, code: int) -> None:
        index = self._unpack(_MEMO_INDEXES[code])
        require(index in self._memo)
        self._stack.append(self._memo[index])

    def _load_persistent(self, code: int) -> None:
        if self._persistent is None:
            raise ValueError("it refers to a storage, which does not exist")
        self._stack.append(self._persistent(self._pop()))


_INSTRUCTIONS = {
    "_skip": (pickle.PROTO, pickle.FRAME), "_tuple": (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
    "_append": (pickle.APPEND, pickle.APPENDS), "_add_to_set": (pickle.ADDITEMS,),
    "_set_items": (pickle.SETITEM, pickle.SETITEMS), "_global": (pickle.GLOBAL, pickle.STACK_GLOBAL),
    "_call": (pickle.REDUCE, pickle.NEWOBJ), "_set_state": (pickle.BUILD,),
    "_put": (pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE), "_get": (pickle.BINGET, pickle.LONG_BINGET),
    "_load_persistent": (pickle.BINPERSID,),
}  # fmt: skip
_METHODS = {
    **{code[0]: name for name, codes in _INSTRUCTIONS.items() for code in codes},
    **dict.fromkeys(_NUMBERS, "_number"),
    **dict.fromkeys(_LENGTHS, "_string"),
}
"""Instruction -> name of the method that executes it."""
