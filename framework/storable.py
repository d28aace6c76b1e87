"""What a checkpoint may hold, looked at before it is written: what could not be read again is refused by its place."""

import os
from collections import Counter, OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from orthotrain.errors import ConfigurationError, visible

_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)


def storable(value: Any, place: tuple[str, ...] = ()) -> Any:
    """Return a checkpoint as it is written; what is read from the file is equal to it.

    A tensor that repeats the values of its storage (``expand``) is copied out. Paths become strings; numbers and
    dictionaries of other classes (NumPy's, Lightning's) become those of Python.

    Args:
        value: Nested plain values and tensors.
        place: Where in the checkpoint the value stands, for messages.

    Raises:
        ConfigurationError: For an object, a key that is no string or integer, or a tensor that is no plain one.
    """
    if isinstance(value, Tensor):
        return _tensor(value, place)
    if type(value) in (*_PLAIN, Counter, torch.Size):
        return value
    if isinstance(value, dict):
        return _dictionary(value, place)
    if type(value) in (list, tuple):
        return type(value)(storable(inner, (*place, str(number))) for number, inner in enumerate(value))
    if type(value) is set and all(type(inner) in (str, int, bool) for inner in value):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    for plain in (int, float, str):
        if isinstance(value, plain):
            return plain(value)
    raise _refused(f"a {type(value).__name__}", place)


def _dictionary(value: dict, place: tuple[str, ...]) -> dict:
    for key in value:
        if type(key) not in (str, int):
            raise _refused(f"a dictionary with the key {key!r}, which is no string and no integer", place)
    made = OrderedDict() if isinstance(value, OrderedDict) else {}
    made.update((key, storable(inner, (*place, str(key)))) for key, inner in value.items())
    if hasattr(value, "_metadata"):  # the versions that a state dict notes of its modules
        made._metadata = value._metadata  # type: ignore[union-attr]
    return made


def _tensor(value: Tensor, place: tuple[str, ...]) -> Tensor:
    own_form = type(value).__reduce_ex__ is not Tensor.__reduce_ex__
    if type(value) not in (Tensor, nn.Parameter) and not own_form:
        raise _refused(f"a tensor of the class {type(value).__name__}", place)
    if value.layout != torch.strided or value.is_quantized or value.is_meta or value.is_nested:
        raise _refused(f"a tensor that is sparse, quantised, nested or without values ({value.layout})", place)
    repeats = any(stride == 0 and size > 1 for stride, size in zip(value.stride(), value.shape, strict=True))
    return value.contiguous() if repeats else value


def _refused(what: str, place: tuple[str, ...]) -> ConfigurationError:
    where = visible(".".join(name[:80] for name in place)) or "the checkpoint"
    return ConfigurationError(
        f"{where} is {what}, which a checkpoint cannot give back: store plain values (numbers, strings, lists, "
        "dictionaries) and tensors"
    )
