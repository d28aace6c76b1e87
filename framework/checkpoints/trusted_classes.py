"""The classes that a checkpoint may name. A file describes a network, and must not choose which code runs."""

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
"""Modules whose public classes a checkpoint may name. No other module is imported because of a checkpoint."""

BASES = (ModelBuilder, Optimizer, LRScheduler)

LOADING_FOLDERS = ("cache_dir", "device_map", "offload_folder", "proxies", "token")
"""Options for loading a pretrained model that choose folders of files, the proxy or the account of a download."""

_DOTTED = re.compile(r"[A-Za-z_]\w{0,99}(\.[A-Za-z_]\w{0,99}){1,9}", re.ASCII)


class TrustedClasses:
    """The classes that one checkpoint may name: known classes, registered parameterizations, and allowed classes.

    A name must equal the name of a known class as a whole. Nothing is imported because a file names it, except a class
    that the caller has allowed by its exact name.

    Args:
        origin: Name of the checkpoint, for messages.
        allow: Further classes, or dotted names of classes or functions, that the file may name; or names in
            :data:`LOADING_FOLDERS`.
        remote_code: Whether the file may ask to run code that comes with a pretrained model.
    """

    def __init__(self, origin: str, allow: Iterable[str | type] = (), remote_code: bool = False) -> None:
        self.origin = origin
        self.remote_code = remote_code
        self.allowed = {name if isinstance(name, str) else dotted_name(name): name for name in allow}

    def check(self, name: object) -> None:
        """Refuse a name that the file may not use. Nothing is imported.

        Raises:
            ConfigurationError: The message gives the name, and how to allow it.
        """
        if not isinstance(name, str) or not (name in self.allowed or _known(name)):
            raise ConfigurationError(
                f"{self.origin} names {name!s:.200}, which is not a known class of a network or an optimizer: "
                f"{_advice(name)}"
            )

    def find(self, name: str) -> Any:
        """Return the class, or the allowed function, for a dotted name or the registered name of a parameterization.

        Raises:
            ConfigurationError: As :meth:`check`; or an allowed class cannot be imported.
        """
        self.check(name)
        given = self.allowed[name] if name in self.allowed else _known(name)
        if not isinstance(given, str):
            return given
        module_name, _, attribute = given.rpartition(".")
        try:
            return getattr(importlib.import_module(module_name), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigurationError(f"the allowed {name!r} cannot be imported: {error}") from error

    def check_argument(self, name: str, value: Any, position: str) -> None:
        """Refuse a stored argument that would give the file more rights than the caller has given it.

        Args:
            name: Name of the argument, or the key of a nested value.
            value: A plain value.
            position: Position in the description.

        Raises:
            ConfigurationError: The argument would run code that comes with a pretrained model, would choose a folder or
                a proxy for a download, or would allow classes that the caller has not allowed.
        """
        if name == "trust_remote_code" and value and not self.remote_code:
            raise ConfigurationError(
                f"{self.origin} asks to run code that comes with a pretrained model: read that code, and pass "
                "trust_remote_code=True (export --trust_remote_code) if you trust it"
            )
        if name in LOADING_FOLDERS and ".options" in position and value is not None and name not in self.allowed:
            raise ConfigurationError(
                f"{self.origin} asks to load a model with {name}={value!r:.200}: if that is right here, allow it: "
                f"allow=[{name!r}], export --allow {name}"
            )
        if name == "allow":
            for own in value if isinstance(value, list) else [value] * (value is not None):
                self.check(own)


def _advice(name: object) -> str:
    """Return how to allow a class. For a name that cannot be a user's class, return that the file must not be used."""
    if not isinstance(name, str) or not _DOTTED.fullmatch(name) or name.partition(".")[0] in sys.stdlib_module_names:
        return "`orthotrain fit` never writes this name, do not use the file"
    return f"if the class is your own and you trust it, allow it: allow=[{name!r}], export --allow {name}"


def dotted_name(cls: type) -> str:
    """Return the name under which a class can be imported."""
    return f"{cls.__module__}.{cls.__qualname__}"


def _known(name: str) -> type | None:
    return _known_classes().get(name) or find_registered(name)


@functools.cache
def _known_classes() -> dict[str, type]:
    """Return the known classes, each by its public name and by the name of the module that defines it."""
    table: dict[str, type] = {}
    for holder in HOLDERS:
        module = importlib.import_module(holder)
        for name in dir(module):
            cls = getattr(module, name)
            if not isinstance(cls, type) or name.startswith("_"):
                continue
            ours = holder.startswith("orthotrain") and cls.__module__.startswith("orthotrain.")
            # from our own modules also the dataclasses with settings, and the LightningModules
            if issubclass(cls, BASES) or (ours and (dataclasses.is_dataclass(cls) or hasattr(cls, "configure_model"))):
                table[f"{holder}.{name}"] = table[dotted_name(cls)] = cls
    return table
