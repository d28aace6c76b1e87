"""Which classes a checkpoint may name: a file says what a network is, and must not choose what code runs."""

import importlib
import re
import sys
import zipfile
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from orthotrain.errors import ConfigurationError
from orthotrain.models import ModelBuilder
from orthotrain.plugins import Parameterization, known

PACKAGES = ("orthotrain", "torch.nn", "torch.optim", "bitsandbytes.optim", "galore_torch")
"""What may be imported because a file says so."""

BASES = (nn.Module, ModelBuilder, Optimizer, LRScheduler, Parameterization)

_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def check_classes(description: Any, origin: str, allow: Iterable[str | type] = (), remote_code: bool = False) -> None:
    """Refuse a description that names other code than networks, optimizers and what belongs to them.

    Those of this package and of torch are known; those that the caller has imported are the caller's choice, and so are
    registered parameterizations. Everything else must be in ``allow``: nothing is imported to look at it.

    Args:
        description: What a checkpoint says of its module, as nested plain values.
        origin: Name of the checkpoint, for messages.
        allow: Classes, or dotted names of classes or functions, that it may name besides; these are imported.
        remote_code: Whether it may say that code which comes with a pretrained model is run.

    Raises:
        ConfigurationError: Naming what is refused and how to allow it.
    """
    allowed = {name if isinstance(name, str) else f"{name.__module__}.{name.__qualname__}" for name in allow}
    known()  # imports what installed packages offer
    for key, value in _walk(description):
        if key == "trust_remote_code" and value and not remote_code:
            raise ConfigurationError(
                f"{origin} asks to run code that comes with a pretrained model: read that, and pass "
                "trust_remote_code=True (export --trust_remote_code) if you trust it"
            )
        if not isinstance(value, str) or value in allowed:
            continue
        if _DOTTED.fullmatch(value) and (key == "class_path" or find_spec(value.partition(".")[0])):
            if not _is_known(value):
                raise ConfigurationError(
                    f"{origin} names {value}, which is no network, optimizer or part of one that is known here: import "
                    f"it first, or allow it if you trust it: allow=[{value!r}], export --allow {value}"
                )
        elif len(value) < 4096 and Path(value).is_file() and not zipfile.is_zipfile(value):
            raise ConfigurationError(f"{origin} names a file {value!r}, which might be read as its description")


def _walk(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every plain value with the key, or that of the list, it stands under; keys are values too."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _walk(inner, str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _walk(inner, key)
    else:
        yield key, value


def _is_known(name: str) -> bool:
    """Tell whether a dotted name is that of a class that a description may consist of."""
    module_name, _, class_name = name.rpartition(".")
    module = sys.modules.get(module_name)
    if module is None and any(module_name == p or module_name.startswith(f"{p}.") for p in PACKAGES):
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            return False
    found = getattr(module, class_name, None)
    ours = getattr(found, "__module__", "").startswith("orthotrain.")  # settings are plain dataclasses
    return isinstance(found, type) and (ours or issubclass(found, BASES))
