"""What a checkpoint may hold, looked at before it is written: what could not be read again is refused by its place."""

import os
from collections import Counter, OrderedDict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from orthotrain.errors import ConfigurationError, visible

MOST_DEPTH = 95
"""Levels; a reader takes a few more."""

_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)


def storable(checkpoint: Any) -> Any:
    """Return a checkpoint as it is written; what is read from the file is equal to it.

    A tensor that repeats the values of its storage (``expand``) is copied out. Paths become strings; numbers and
    dictionaries of other classes (NumPy's, Lightning's) become those of Python.

    Args:
        checkpoint: Nested plain values and tensors.

    Raises:
        ConfigurationError: For an object, a key that is no string or integer, a tensor that is no plain one, or values
            that hold themselves.
    """
    return _Plain().value(checkpoint, ())


class _Plain:
    """One walk: what stands in several places is made once, as the file holds it once."""

    def __init__(self) -> None:
        self.made: dict[int, Any] = {}

    def value(self, value: Any, place: tuple[str, ...]) -> Any:
        if type(value) in (*_PLAIN, Counter, torch.Size):
            return value
        if len(place) > MOST_DEPTH:
            raise _refused("nested too deeply, or holds itself", place[:4])
        if id(value) not in self.made:
            self.made[id(value)] = self._make(value, place)
        return self.made[id(value)]

    def _make(self, value: Any, place: tuple[str, ...]) -> Any:
        if isinstance(value, Tensor):
            return _tensor(value, place)
        if isinstance(value, dict):
            return self._dictionary(value, place)
        if type(value) in (list, tuple):
            return type(value)(self.value(inner, (*place, str(number))) for number, inner in enumerate(value))
        if type(value) is set and all(type(inner) in (str, int, bool) for inner in value):
            return value
        if isinstance(value, np.generic):
            return self.value(value.item(), place)
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        for plain, made in ((int, int), (float, float), (str, str.__str__)):
            if isinstance(value, plain):
                return made(value)
        raise _refused(f"a {type(value).__name__}", place)

    def _dictionary(self, value: dict, place: tuple[str, ...]) -> dict:
        for key in value:
            if type(key) not in (str, int):
                raise _refused(f"a dictionary with the key {key!r}, which is no string and no integer", place)
        made: Any = OrderedDict() if isinstance(value, OrderedDict) else {}
        made.update((key, self.value(inner, (*place, str(key)))) for key, inner in value.items())
        if hasattr(value, "_metadata"):  # the versions that a state dict notes of its modules
            made._metadata = value._metadata
        return made


def _tensor(value: Tensor, place: tuple[str, ...]) -> Tensor:
    own_form = type(value).__reduce_ex__ is not Tensor.__reduce_ex__
    if type(value) not in (Tensor, nn.Parameter) and not own_form:
        raise _refused(f"a tensor of the class {type(value).__name__}", place)
    if value.layout != torch.strided or value.is_quantized or value.is_meta or value.is_nested:
        raise _refused(f"a tensor that is sparse, quantised, nested or without values ({value.layout})", place)
    if value.is_conj() or value.is_neg():
        value = value.resolve_conj().resolve_neg()
    repeats = any(stride == 0 and size > 1 for stride, size in zip(value.stride(), value.shape, strict=True))
    return value.contiguous() if repeats else value


def _refused(what: str, place: tuple[str, ...]) -> ConfigurationError:
    where = visible(".".join(name[:80] for name in place)) or "the checkpoint"
    return ConfigurationError(
        f"{where} is {what}, which a checkpoint cannot give back: store plain values (numbers, strings, lists, "
        "dictionaries) and tensors"
    )
