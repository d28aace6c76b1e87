"""What a file of ``torch.save`` holds: plain values and tensors, looked at before a byte of a tensor is read.

Refused by the name of their place are objects, tensors without values or with values that lie elsewhere than in the
file, and structures that are deep, that hold themselves, or that a shared part makes far larger than the file.
"""

import gc
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from orthotrain.errors import visible
from orthotrain.files.archive import Archive
from orthotrain.files.plain_pickle import MOST_INSTRUCTIONS, Foreign, Interpreter

MOST_DEPTH = 100
MOST_PICKLE_BYTES = 1 << 29
_EXPANSION, _SMALL = 16, 1 << 20
_INSTRUCTIONS_OF_A_TENSOR = 256
_STORAGES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128,
}  # fmt: skip
_KINDS = {
    "_rebuild_meta_tensor_no_storage": "a meta tensor, which has no values",
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_sparse_csr_tensor": "a sparse tensor",
    "_rebuild_qtensor": "a quantized tensor",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_wrapper_subclass": "a tensor of a subclass",
    "_rebuild_from_type_v2": "a tensor of a subclass",
    "_rebuild_parameter_with_state": "a parameter with attributes",
}
"""What torch calls to build a tensor that is none of ours -> what that is."""


@dataclass(frozen=True, slots=True)
class Storage:
    """Where the values of tensors lie: ``values`` values of a dtype (None for bytes) in the entry ``data/KEY``."""

    dtype: torch.dtype | None
    key: str
    values: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor that has not been read: its part of a storage, and for a parameter whether it has a gradient."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    requires_grad: bool | None = None


def read_description(archive: Archive) -> Any:
    """Return what an archive holds with a :class:`StoredTensor` in the place of each tensor.

    Raises:
        ValueError: Naming the first thing, by its place, that is refused.
    """
    if "byteorder" in archive and archive.read("byteorder") != b"little":
        raise ValueError("it was written on a machine of another byte order")
    if (size := archive.size_of("data.pkl")) > MOST_PICKLE_BYTES:
        raise ValueError(f"it describes its values in {size:,} bytes, more than a checkpoint needs")
    data = archive.read("data.pkl")
    most = MOST_INSTRUCTIONS + _INSTRUCTIONS_OF_A_TENSOR * len(archive) + archive.size // 256
    with _without_collection():
        root = Interpreter(data, _known, _storage, _give_state, most=most).run()
        _Walk(archive, _EXPANSION * len(data) + _SMALL).check(root)
    return root


@contextmanager
def _without_collection() -> Iterator[None]:
    """Keep the garbage collector from walking through millions of new objects again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def read_values(root: Any, archive: Archive, verify: bool = True) -> Any:
    """Return what :func:`read_description` has returned with the tensors read into memory, shared ones once.

    Args:
        root: The description.
        archive: What it describes.
        verify: Whether the values are compared with their checksums.

    Raises:
        ValueError: If a tensor is cut or altered.
    """
    return _Reading(archive, verify).value(root)


class _Walk:
    """One walk through a description: places, depth, and how large it would be with every shared part copied."""

    def __init__(self, archive: Archive, most: int) -> None:
        self.archive, self.most = archive, most
        self.known: dict[int, tuple[int, int] | None] = {}

    def check(self, root: Any) -> None:
        """Refuse what is no plain value or tensor of the archive."""
        size, _ = self.measure(root, ())
        if size > self.most:
            raise ValueError("shared parts make it expand far beyond the size of the file")

    def measure(self, value: Any, place: tuple[Any, ...]) -> tuple[int, int]:
        """Return size and depth of a value."""
        if isinstance(value, str | bytes):
            return 1 + len(value), 0
        if isinstance(value, StoredTensor):
            if id(value) not in self.known:
                _check_tensor(value, self.archive, place)
                self.known[id(value)] = (1, 0)
            return 1, 0
        if not isinstance(value, dict | list | tuple | set):
            if isinstance(value, Foreign | Storage | partial) or callable(value):
                raise ValueError(f"{_at(place)} is {_kind(value)}; only plain values and tensors are read")
            return 1, 0
        if id(value) in self.known:
            found = self.known[id(value)]
            if found is None:
                raise ValueError(f"{_at(place)} holds itself")
        else:
            self.known[id(value)] = None
            found = self.known[id(value)] = self._measure_inner(value, place)
        if len(place) + found[1] > MOST_DEPTH:
            raise ValueError(f"{_at(place[:3])} is nested more than {MOST_DEPTH} levels deep")
        return found

    def _measure_inner(self, value: Any, place: tuple[Any, ...]) -> tuple[int, int]:
        if len(place) > MOST_DEPTH:
            raise ValueError(f"{_at(place[:3])} is nested more than {MOST_DEPTH} levels deep")
        size, depth = 1, 0
        for name, inner in _children(value):
            inner_size, inner_depth = self.measure(inner, (*place, name))
            size += inner_size + (len(name) if isinstance(name, str) else 1)
            depth = max(depth, inner_depth + 1)
        return size, depth


class _Reading:
    """Puts tensors in the places of their descriptions."""

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
        if isinstance(value, tuple):
            return tuple(self.value(inner) for inner in value)
        if isinstance(value, list):
            return [self.value(inner) for inner in value]
        made = type(value)((name, self.value(inner)) for name, inner in value.items())
        if hasattr(value, "_metadata"):
            made._metadata = value._metadata
        return made

    def _tensor(self, described: StoredTensor) -> Tensor:
        key = described.storage.key
        if key not in self.storages:
            values = torch.empty(self.archive.size_of(f"data/{key}"), dtype=torch.uint8)
            self.archive.read_into(f"data/{key}", memoryview(values.numpy()), self.verify)
            self.storages[key] = values.untyped_storage()
        with torch.device("cpu"):
            tensor = torch.empty(0, dtype=described.dtype)
        tensor.set_(self.storages[key], described.offset, described.shape, described.strides)
        if described.requires_grad is None:
            return tensor
        return nn.Parameter(tensor, described.requires_grad)


def _known(module: str, name: str) -> Any:
    """Return what stands for a name in the pickle of a checkpoint."""
    if module == "torch._utils" and name in _BUILDERS:
        return _BUILDERS[name]
    if module == "torch" and name in _STORAGES:
        return _STORAGES[name]
    if (module, name) == ("torch.storage", "UntypedStorage"):
        return torch.uint8
    if module == "torch" and isinstance(found := vars(torch).get(name), torch.dtype):
        return found
    return _PLAIN.get((module.replace("__builtin__", "builtins"), name)) or Foreign(f"{module}.{name}")


def _storage(identity: Any) -> Storage | Foreign:
    parts: Any = identity if isinstance(identity, tuple) and len(identity) == 5 else [None] * 5
    kind, dtype, key, _, values = parts
    if kind == "storage" and isinstance(dtype, Foreign):
        return dtype
    if kind != "storage" or not isinstance(dtype, torch.dtype) or type(key) is not str or not _is_count(values):
        raise ValueError("it describes a storage of another kind")
    return Storage(dtype, key, values)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Any:
    if not isinstance(storage, Storage):
        return storage if isinstance(storage, Foreign) else Foreign("a tensor without values")
    if any(isinstance(option, dict) and option for option in rest):  # a conjugate or negative bit, or hooks
        return Foreign("a tensor whose values are to be changed when they are read")
    dtype = next((option for option in rest if isinstance(option, torch.dtype)), storage.dtype)
    assert dtype is not None
    lists = isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides) <= 64
    if not lists or not all(map(_is_count, (offset, *shape, *strides))):
        raise ValueError("it describes a tensor of sizes that are no counts")
    return StoredTensor(storage, dtype, offset, tuple(shape), tuple(strides))


def _parameter(data: Any, requires_grad: Any, *hooks: Any) -> Any:
    if not isinstance(data, StoredTensor) or not isinstance(requires_grad, bool):
        return Foreign("a parameter of another kind")
    return StoredTensor(data.storage, data.dtype, data.offset, data.shape, data.strides, requires_grad)


def _ordered(*items: Any) -> OrderedDict:
    if items:
        raise ValueError("its description is cut or garbled")
    return OrderedDict()


def _counter(counts: Any = None) -> Counter:
    if not isinstance(counts, dict) or not all(map(_is_count, counts.values())):
        raise ValueError("it describes a counter of other things than counts")
    return Counter(counts)


def _size(values: Any) -> torch.Size:
    if not isinstance(values, tuple | list) or not all(map(_is_count, values)):
        raise ValueError("it describes a size that is no list of counts")
    return torch.Size(values)


def _device(kind: Any, index: Any = None) -> torch.device:
    if kind not in ("cpu", "cuda", "meta", "mps", "xpu") or not (index is None or _is_count(index)):
        raise ValueError(f"it names a device {str(kind)[:40]!r}")
    return torch.device(kind) if index is None else torch.device(kind, index)


def _bytes(text: Any, encoding: Any = None) -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise ValueError("its description is cut or garbled")
    return text.encode("latin1")


def _set(values: Any = ()) -> set:
    if not isinstance(values, list | tuple) or not all(type(value) in (str, int, bool) for value in values):
        raise ValueError("it describes a set of other things than strings and integers")
    return set(values)


_BUILDERS: dict[str, Callable[..., Any]] = {
    "_rebuild_tensor_v2": _tensor,
    "_rebuild_tensor_v3": _tensor,
    "_rebuild_parameter": _parameter,
}
_PLAIN: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _ordered,
    ("collections", "Counter"): _counter,
    ("torch", "Size"): _size,
    ("torch", "device"): _device,
    ("_codecs", "encode"): _bytes,
    ("builtins", "set"): _set,
}
"""The classes of plain values that a checkpoint of torch and Lightning may have -> what makes them here."""


def _give_state(target: Any, state: Any) -> None:
    """Take the versions that ``nn.Module.state_dict`` notes of its modules, the only state that is known."""
    versions = state.get("_metadata") if isinstance(target, OrderedDict) and isinstance(state, dict) else None
    if not isinstance(versions, dict) or len(state) != 1 or not all(isinstance(v, dict) for v in versions.values()):
        raise ValueError(f"it gives a state to a {type(target).__name__}, which has none")
    target._metadata = versions  # type: ignore[attr-defined]


def _children(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict):
        yield from value.items()
        if hasattr(value, "_metadata"):
            yield "_metadata", value._metadata
    else:
        yield from enumerate(value)


def _check_tensor(tensor: StoredTensor, archive: Archive, place: tuple[Any, ...]) -> None:
    """Refuse a tensor whose values are not in its entry, each of them once."""
    storage, name = tensor.storage, f"data/{tensor.storage.key}"
    there = archive.size_of(name) if name in archive else -1
    itemsize = tensor.dtype.itemsize
    assert storage.dtype is not None
    if storage.values * storage.dtype.itemsize != there:
        raise ValueError(f"{_at(place)} has {storage.values:,} values in a storage of {max(there, 0):,} bytes")
    used = [(stride, size) for size, stride in zip(tensor.shape, tensor.strides, strict=True) if size != 1]
    if any(size == 0 for _, size in used):
        return
    reach = 0
    for stride, size in sorted(used):
        if stride <= reach:
            raise ValueError(f"{_at(place)} is a view that repeats the values of its storage, {tensor.shape}")
        reach += stride * (size - 1)
    if (tensor.offset + reach + 1) * itemsize > there:
        raise ValueError(f"{_at(place)} of shape {tensor.shape} lies beyond the end of its storage")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _kind(value: Any) -> str:
    name = value.name if isinstance(value, Foreign) else f"a {type(value).__name__}"
    return _KINDS.get(name.rpartition(".")[2], name)


def _at(place: tuple[Any, ...]) -> str:
    return visible(".".join(str(name)[:80] for name in place)) or "what it holds"
