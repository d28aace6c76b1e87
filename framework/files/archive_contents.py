"""The plain values and tensors in an archive of ``torch.save``, checked before a byte of a tensor is read.

Each of these is refused, and the message gives its position: objects, tensors without values or with values outside of
the file, structures that are nested too deeply or that contain themselves, and structures that shared parts make far
larger than the file.
"""

import gc
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from orthotrain.errors import visible
from orthotrain.files.archive import Archive
from orthotrain.files.pickle_classes import Storage, StoredTensor, kind_of, known_class, set_state, storage_of
from orthotrain.files.pickle_interpreter import MOST_INSTRUCTIONS, Interpreter, UnknownName

MOST_DEPTH = 100
MOST_PICKLE_BYTES = 1 << 29
_INSTRUCTIONS_OF_A_TENSOR = 256


def describe_contents(archive: Archive) -> Any:
    """Return the contents of an archive with a :class:`StoredTensor` in the place of each tensor.

    Raises:
        ValueError: Something is refused; the message gives the position of the first such value.
    """
    if "byteorder" in archive and archive.read("byteorder") != b"little":
        raise ValueError("it was written on a machine with another byte order")
    if (size := archive.size_of("data.pkl")) > MOST_PICKLE_BYTES:
        raise ValueError(f"its pickle has {size:,} bytes, more than a checkpoint needs")
    data = archive.read("data.pkl")
    most = MOST_INSTRUCTIONS + _INSTRUCTIONS_OF_A_TENSOR * len(archive) + archive.size // 256
    collects = gc.isenabled()
    gc.disable()  # the garbage collector would walk through millions of new objects again and again
    try:
        root = Interpreter(data, known_class, storage_of, set_state, most=most).run()
        if _Checker(archive).check(root, ())[0] > 16 * len(data) + (1 << 20):
            raise ValueError("its shared parts expand to far more than the size of the file")
    finally:
        if collects:
            gc.enable()
    return root


def read_tensors(root: Any, archive: Archive, verify: bool = True) -> Any:
    """Return the contents of an archive with its tensors read into memory. Tensors that share values still share them.

    Args:
        root: The result of :func:`describe_contents`.
        archive: The same archive.
        verify: Whether the values are compared with their checksums.

    Raises:
        ValueError: A tensor is truncated or changed.
    """
    return _Reader(archive, verify).value(root)


def dotted(keys: tuple[Any, ...], root: str = "the value in it") -> str:
    """Return the keys of a nested value with dots between them, for messages; ``root`` if there are none."""
    return visible(".".join(str(key)[:80] for key in keys)) or root


class _Checker:
    """Checks nested values, and measures how large they would be with a copy of each shared part."""

    def __init__(self, archive: Archive) -> None:
        self.archive = archive
        self.measured: dict[int, tuple[int, int] | None] = {}  # None for a value that is being measured

    def check(self, value: Any, keys: tuple[Any, ...]) -> tuple[int, int]:
        """Return size and depth of a value, or refuse it.

        Args:
            value: A value at any depth.
            keys: Where the value is, from the root.
        """
        if isinstance(value, str | bytes):
            return 1 + len(value), 0
        if isinstance(value, StoredTensor):
            if id(value) not in self.measured:
                _check_tensor(value, self.archive, keys)
                self.measured[id(value)] = (1, 0)
            return 1, 0
        if not isinstance(value, dict | list | tuple | set):
            if isinstance(value, UnknownName | Storage | partial) or callable(value):
                raise ValueError(f"{dotted(keys)} is {kind_of(value)}; only plain values and tensors are read")
            return 1, 0
        if id(value) in self.measured:
            found = self.measured[id(value)]
            if found is None:
                raise ValueError(f"{dotted(keys)} contains itself")
        else:
            _check_depth(len(keys), keys)
            self.measured[id(value)] = None
            size, depth = 1, 0
            for key, inner in _items(value):
                inner_size, inner_depth = self.check(inner, (*keys, key))
                size += inner_size + (len(key) if isinstance(key, str) else 1)
                depth = max(depth, inner_depth + 1)
            found = self.measured[id(value)] = (size, depth)
        _check_depth(len(keys) + found[1], keys)
        return found


class _Reader:
    """Replaces each stored tensor by a tensor."""

    def __init__(self, archive: Archive, verify: bool) -> None:
        self.archive, self.verify = archive, verify
        self.storages: dict[str, torch.UntypedStorage] = {}
        self.made: dict[int, Any] = {}

    def value(self, value: Any) -> Any:
        """Return a value with its tensors."""
        if not isinstance(value, StoredTensor | dict | list | tuple):
            return value
        if id(value) not in self.made:
            self.made[id(value)] = self._make(value)
        return self.made[id(value)]

    def _make(self, value: Any) -> Any:
        if isinstance(value, StoredTensor):
            return self._tensor(value)
        if isinstance(value, Counter | torch.Size):
            return value
        if isinstance(value, tuple | list):
            return type(value)(self.value(inner) for inner in value)
        made = type(value)((key, self.value(inner)) for key, inner in value.items())
        if hasattr(value, "_metadata"):
            made._metadata = value._metadata
        return made

    def _tensor(self, stored: StoredTensor) -> Tensor:
        key = stored.storage.key
        if key not in self.storages:
            values = torch.empty(self.archive.size_of(f"data/{key}"), dtype=torch.uint8)
            self.archive.read_into(f"data/{key}", memoryview(values.numpy()), self.verify)
            self.storages[key] = values.untyped_storage()
        with torch.device("cpu"):
            tensor = torch.empty(0, dtype=stored.dtype)
        tensor.set_(self.storages[key], stored.offset, stored.shape, stored.strides)
        return tensor if stored.requires_grad is None else nn.Parameter(tensor, stored.requires_grad)


def _items(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict):
        yield from value.items()
        if hasattr(value, "_metadata"):
            yield "_metadata", value._metadata
    else:
        yield from enumerate(value)


def _check_depth(depth: int, keys: tuple[Any, ...]) -> None:
    if depth > MOST_DEPTH:
        raise ValueError(f"{dotted(keys[:3])} is nested more than {MOST_DEPTH} levels deep")


def _check_tensor(tensor: StoredTensor, archive: Archive, keys: tuple[Any, ...]) -> None:
    """Refuse a tensor unless its entry holds each of its values exactly once."""
    storage, name = tensor.storage, f"data/{tensor.storage.key}"
    size = archive.size_of(name) if name in archive else -1
    if storage.values * storage.dtype.itemsize != size:
        raise ValueError(f"{dotted(keys)} has {storage.values:,} values in a storage of {max(size, 0):,} bytes")
    used = [(stride, length) for length, stride in zip(tensor.shape, tensor.strides, strict=True) if length != 1]
    if any(length == 0 for _, length in used):
        return
    last = 0
    for stride, length in sorted(used):
        if stride <= last:
            raise ValueError(f"{dotted(keys)} of shape {tensor.shape} repeats values of its storage")
        last += stride * (length - 1)
    if (tensor.offset + last + 1) * tensor.dtype.itemsize > size:
        raise ValueError(f"{dotted(keys)} of shape {tensor.shape} ends beyond its storage")
