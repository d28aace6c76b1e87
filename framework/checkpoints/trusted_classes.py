"""Which classes a checkpoint may name: a file says what a network is, and must not choose what code runs."""

import dataclasses
import functools
import importlib
import re
import sys
from collections.abc import Iterable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from orthotrain.errors import ConfigurationError
from orthotrain.models import ModelBuilder
from orthotrain.plugins import find_registered

HOLDERS = (
    "orthotrain",
    *(f"orthotrain.{room}" for room in ("modules", "models", "export", "optimizers", "schedules")),
    *("torch.optim", "torch.optim.lr_scheduler", "bitsandbytes.optim"),
)
"""The modules whose public classes a checkpoint may name. Only these are imported; no file adds to them."""

BASES = (ModelBuilder, Optimizer, LRScheduler)

LOADING_FOLDERS = ("cache_dir", "device_map", "offload_folder", "proxies", "token")
"""Options of loading a pretrained model that say where files are written, how they are fetched, and as whom."""

_DOTTED = re.compile(r"[A-Za-z_]\w{0,99}(\.[A-Za-z_]\w{0,99}){1,9}", re.ASCII)


class TrustedClasses:
    """The classes that one checkpoint may name: those of the table, registered parameterizations, and allowed ones.

    A name is compared with the table as a whole string. Nothing is imported because a file names it; only what the
    caller has allowed by its exact name is.

    Args:
        origin: Name of the checkpoint, for messages.
        allow: Classes, or dotted names of classes or functions, that the file may name besides; or names of
            :data:`LOADING_FOLDERS`.
        remote_code: Whether the file may say that code which comes with a pretrained model is run.
    """

    def __init__(self, origin: str, allow: Iterable[str | type] = (), remote_code: bool = False) -> None:
        self.origin = origin
        self.remote_code = remote_code
        self.allowed = {name if isinstance(name, str) else dotted_name(name): name for name in allow}

    def check(self, name: object) -> None:
        """Refuse a name that the file may not use, without importing what the caller has allowed.

        Raises:
            ConfigurationError: Naming what is refused and how to allow it.
        """
        if not isinstance(name, str) or not (name in self.allowed or _known(name)):
            raise ConfigurationError(
                f"{self.origin} names {name!s:.200}, which is no network, optimizer or part of one that is known here: "
                f"{_advice(name)}"
            )

    def find(self, name: str) -> Any:
        """Return the class (or the allowed function) of a dotted name, or of a parameterization's registered name.

        Raises:
            ConfigurationError: As :meth:`check`; or if what the caller has allowed cannot be imported.
        """
        self.check(name)
        return self._allowed(name) if name in self.allowed else _known(name)

    def check_argument(self, name: str, value: Any, place: str) -> None:
        """Refuse a stored argument with which a file would trust itself or other files, or choose where is written.

        Args:
            name: Name of the argument, or the key of a nested value.
            value: Plain.
            place: Where in the description it stands.

        Raises:
            ConfigurationError: For code that comes with a pretrained model, for folders and proxies of a download, and
                for a list of allowed classes with more in it than the caller has allowed.
        """
        if name == "trust_remote_code" and value and not self.remote_code:
            raise ConfigurationError(
                f"{self.origin} asks to run code that comes with a pretrained model: read that code, and pass "
                "trust_remote_code=True (export --trust_remote_code) if you trust it"
            )
        if name in LOADING_FOLDERS and ".options" in place and value is not None and name not in self.allowed:
            raise ConfigurationError(
                f"{self.origin} asks to load a model with {name}={value!r:.200}: if that is right here, allow it: "
                f"allow=[{name!r}], export --allow {name}"
            )
        if name == "allow":
            for own in value if isinstance(value, list) else [value] * (value is not None):
                self.check(own)

    def _allowed(self, name: str) -> Any:
        given = self.allowed[name]
        if not isinstance(given, str):
            return given
        module_name, _, attribute = given.rpartition(".")
        try:
            return getattr(importlib.import_module(module_name), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigurationError(f"the allowed {name!r} cannot be imported: {error}") from error


def _advice(name: object) -> str:
    """Return how a class of the user's own is allowed; for a name that can be none, only that the file is not sound."""
    if not isinstance(name, str) or not _DOTTED.fullmatch(name) or name.partition(".")[0] in sys.stdlib_module_names:
        return "no `orthotrain fit` writes that, do not use the file"
    return f"if the class is your own and you trust it, allow it: allow=[{name!r}], export --allow {name}"


def dotted_name(cls: type) -> str:
    """Return the name under which a class can be imported."""
    return f"{cls.__module__}.{cls.__qualname__}"


def _known(name: str) -> type | None:
    return _known_classes().get(name) or find_registered(name)


@functools.cache
def _known_classes() -> dict[str, type]:
    """Return the table: the public name of each class, and the name of where it is defined."""
    table: dict[str, type] = {}
    for holder in HOLDERS:
        module = importlib.import_module(holder)
        for name in dir(module):
            cls = getattr(module, name)
            if not isinstance(cls, type) or name.startswith("_"):
                continue
            ours = holder.startswith("orthotrain") and cls.__module__.startswith("orthotrain.")
            # of our own modules also the settings (dataclasses) and the LightningModules
            if issubclass(cls, BASES) or (ours and (dataclasses.is_dataclass(cls) or hasattr(cls, "configure_model"))):
                table[f"{holder}.{name}"] = table[dotted_name(cls)] = cls
    return table
