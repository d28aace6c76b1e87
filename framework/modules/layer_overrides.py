"""The setting ``overrides`` of POET and OFT: other settings for some layers."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any, Self, cast

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from orthotrain.errors import ConfigurationError
from orthotrain.layers.rotation.generator_marks import rotated_share
from orthotrain.layers.selection import ends_with

NETWORK_SETTINGS = ("include", "exclude", "overrides", "train", "freeze")
"""Settings that choose layers and parameters of the network, and so have no meaning for one layer."""


@dataclass(frozen=True)
class LayerOverrides:
    """The field ``overrides`` of settings: glob pattern on module names -> settings that differ there.

    It is a dataclass itself, because jsonargparse writes the keys of a dataclass without ``class_path`` only if all
    bases are dataclasses.
    """

    overrides: dict[str, dict[str, Any]] | None = None

    def for_name(self, name: str) -> Self:
        """Return the settings of the layer ``name``: the first override that matches replaces some of these.

        Raises:
            ConfigurationError: For an override that is no setting of a layer, or has a bad value.
        """
        for pattern, values in (self.overrides or {}).items():
            if matches(name, pattern):
                if nested := sorted(set(values) & set(NETWORK_SETTINGS)):
                    raise ConfigurationError(f"overrides {pattern!r}: {nested[0]} cannot differ by layer")
                return self.override({**values, "overrides": None})
        return self

    def variants(self) -> dict[str, Self]:
        """Return all settings that layers can have, by pattern; the pattern is empty where no override applies.

        Raises:
            ConfigurationError: As :meth:`for_name`.
        """
        return {"": self, **{pattern: self.for_name(pattern) for pattern in self.overrides or {}}}

    def override(self, values: dict[str, Any]) -> Self:
        """Return these settings with some replaced.

        Raises:
            ConfigurationError: For an unknown name or a bad value.
        """
        known = [field.name for field in fields(cast(Any, self))]
        if unknown := sorted(set(values) - set(known)):
            raise ConfigurationError(f"overrides: {unknown[0]!r} is no setting; there are {', '.join(known)}")
        return cast(Self, replace(cast(Any, self), **values))

    def refuse_unused_overrides(self, names: Iterable[str]) -> None:
        """Refuse an override whose pattern matches none of the chosen layers.

        Raises:
            ConfigurationError: Naming the pattern and the layers.
        """
        for pattern in self.overrides or {}:
            if not any(matches(name, pattern) for name in names):
                raise ConfigurationError(
                    f"overrides pattern {pattern!r} matches none of the rotated layers: {', '.join(names)}"
                )


def matches(name: str, pattern: str) -> bool:
    """Tell whether a pattern of ``overrides`` is a name, its last part, or a glob that matches it."""
    return name == pattern or fnmatchcase(name, pattern) or ends_with(name, pattern)


def set_trained(setting: str, patterns: Sequence[str], parameters: Mapping[str, nn.Parameter], trained: bool) -> None:
    """Train or freeze the parameters that glob patterns match.

    Args:
        setting: Name of the setting with the patterns, for the message.
        patterns: Glob patterns on names of parameters.
        parameters: The parameters to choose from, by name.
        trained: Whether the parameters become trained or frozen.

    Raises:
        ConfigurationError: If a pattern matches none, naming the pattern and some of the parameters.
    """
    for pattern in patterns:
        matches = [parameter for name, parameter in parameters.items() if fnmatchcase(name, pattern)]
        if not matches:
            names = ", ".join(parameters)[:200]
            raise ConfigurationError(f"{setting} pattern {pattern!r} matches no parameter; there are {names}")
        for parameter in matches:
            parameter.requires_grad_(trained)


def warn_of_experts(model: nn.Module) -> None:
    """Say in one line that stacks of matrices (experts) are not rotated, and whether they are trained or frozen."""
    stacks = {
        f"{module_name}.{name}": parameter
        for module_name, module in model.named_modules()
        if not isinstance(module, nn.modules.conv._ConvNd)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and parameter.shape[0] > 1 and rotated_share(parameter) is None
    }
    if not stacks:
        return
    trained = sum(parameter.numel() for parameter in stacks.values() if parameter.requires_grad)
    full = f": their {trained:,} numbers are trained in full (layers.freeze freezes them)"
    rank_zero_warn(
        f"{len(stacks)} parameters are stacks of matrices (experts), such as {next(iter(stacks))}: they are no linear "
        f"layers, so they are not rotated{full if trained else ' and stay frozen'}"
    )
