"""The classes and functions that the pickle of a ``torch.save`` file may name, and the values that stand for them.

No name is imported: each is looked up in the tables of this file. A tensor becomes a :class:`StoredTensor`, and a name
that is missing from the tables becomes an :class:`UnknownName`.
"""

from collections import Counter, OrderedDict
from dataclasses import dataclass, replace
from typing import Any

import torch

from orthotrain.files.pickle_interpreter import UnknownName, require

_DTYPES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128,
}  # fmt: skip
_REFUSED_TENSORS = {
    "_rebuild_meta_tensor_no_storage": "a meta tensor, which has no values",
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_sparse_csr_tensor": "a sparse tensor",
    "_rebuild_qtensor": "a quantized tensor",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_wrapper_subclass": "a tensor of a subclass",
    "_rebuild_from_type_v2": "a tensor of a subclass",
    "_rebuild_parameter_with_state": "a parameter with attributes",
}
"""Function of torch that builds a kind of tensor that is not read here -> name of the kind, for messages."""


@dataclass(frozen=True, slots=True)
class Storage:
    """Where the values of tensors are stored: in the entry ``data/KEY``, which has ``values`` values of a dtype."""

    dtype: torch.dtype
    key: str
    values: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor that has not been read: its part of a storage; and for a parameter, whether it requires a gradient."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    requires_grad: bool | None = None


def is_count(value: Any) -> bool:
    """Tell whether a value is an integer that can count something."""
    return type(value) is int and 0 <= value < 1 << 62


def known_class(module: str, name: str) -> Any:
    """Return what stands for a name in the pickle of a checkpoint; for an unknown name an :class:`UnknownName`."""
    if module == "torch" and isinstance(found := vars(torch).get(name), torch.dtype):
        return found
    return _KNOWN.get((module.replace("__builtin__", "builtins"), name)) or UnknownName(f"{module}.{name}")


def kind_of(value: Any) -> str:
    """Return the kind of a refused value, for a message."""
    name = value.name if isinstance(value, UnknownName) else f"a {type(value).__name__}"
    return _REFUSED_TENSORS.get(name.rpartition(".")[2], name)


def storage_of(identity: Any) -> Storage | UnknownName:
    """Return the storage that a persistent id describes."""
    parts: Any = identity if isinstance(identity, tuple) and len(identity) == 5 else [None] * 5
    kind, dtype, key, _, values = parts
    if kind == "storage" and isinstance(dtype, UnknownName):
        return dtype
    if kind != "storage" or not isinstance(dtype, torch.dtype) or type(key) is not str or not is_count(values):
        raise ValueError("it describes an unknown kind of storage")
    return Storage(dtype, key, values)


def set_state(target: Any, state: Any) -> None:
    """Set the versions of modules that ``nn.Module.state_dict`` stores, the only state that is known."""
    versions = state.get("_metadata") if isinstance(target, OrderedDict) and isinstance(state, dict) else None
    if not isinstance(versions, dict) or len(state) != 1 or not all(isinstance(v, dict) for v in versions.values()):
        raise ValueError(f"it sets a state on a {type(target).__name__}, which has none")
    target._metadata = versions  # type: ignore[attr-defined]


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Any:
    if not isinstance(storage, Storage):
        return storage if isinstance(storage, UnknownName) else UnknownName("a tensor without values")
    if any(isinstance(option, dict) and option for option in rest):  # a conjugate or negative bit, or hooks
        return UnknownName("a tensor with a conjugate bit, a negative bit or hooks")
    dtype = next((option for option in rest if isinstance(option, torch.dtype)), storage.dtype)
    lists = isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides) <= 64
    if not lists or not all(map(is_count, (offset, *shape, *strides))):
        raise ValueError("it describes a tensor whose offset, shape or strides are not counts")
    return StoredTensor(storage, dtype, offset, tuple(shape), tuple(strides))


def _parameter(data: Any, requires_grad: Any, *hooks: Any) -> Any:
    if not isinstance(data, StoredTensor) or not isinstance(requires_grad, bool):
        return UnknownName("a parameter without a tensor")
    return replace(data, requires_grad=requires_grad)


def _ordered(*items: Any) -> OrderedDict:
    require(not items)
    return OrderedDict()


def _counter(counts: Any = None) -> Counter:
    if not isinstance(counts, dict) or not all(map(is_count, counts.values())):
        raise ValueError("it describes a Counter whose values are not counts")
    return Counter(counts)


def _size(values: Any) -> torch.Size:
    if not isinstance(values, tuple | list) or not all(map(is_count, values)):
        raise ValueError("it describes a torch.Size that is not a list of counts")
    return torch.Size(values)


def _device(kind: Any, index: Any = None) -> torch.device:
    if kind not in ("cpu", "cuda", "meta", "mps", "xpu") or not (index is None or is_count(index)):
        raise ValueError(f"it names an unknown device {str(kind)[:40]!r}")
    return torch.device(kind) if index is None else torch.device(kind, index)


def _bytes(text: Any, encoding: Any = None) -> bytes:
    require(isinstance(text, str) and encoding == "latin1")
    return text.encode("latin1")


def _set(values: Any = ()) -> set:
    if not isinstance(values, list | tuple) or not all(type(value) in (str, int, bool) for value in values):
        raise ValueError("it describes a set of values that are neither strings nor integers")
    return set(values)


_KNOWN: dict[tuple[str, str], Any] = {
    **{("torch", storage): dtype for storage, dtype in _DTYPES.items()},
    ("torch.storage", "UntypedStorage"): torch.uint8,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("collections", "OrderedDict"): _ordered,
    ("collections", "Counter"): _counter,
    ("torch", "Size"): _size,
    ("torch", "device"): _device,
    ("_codecs", "encode"): _bytes,
    ("builtins", "set"): _set,
}
"""Module and name in checkpoints of torch and Lightning -> dtype of a storage, or function that builds a value."""
