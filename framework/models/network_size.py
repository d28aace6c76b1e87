"""Size of a network, counted from its description before the network is built: a file may describe any size."""

import functools
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import unset_fake_temporarily

from orthotrain.console.limited_process import LimitExceeded, call_limited, first_line
from orthotrain.devices.accelerators import total_bytes
from orthotrain.errors import ConfigurationError
from orthotrain.models.config_faults import compute_row, find_fault, sizes_not_given

MOST_VALUES = 10**13
"""Most values of a network: ten times as many as the largest network that has been trained."""
_MEMORY_BYTES, _SECONDS = 512 << 20, 20.0


class NotBuildable(ConfigurationError):
    """A description from which no network can be built."""


class Fault(Exception):
    """The key of a description from which no network can be built, and its remedy."""


def count_values(build: Callable[[], nn.Module], origin: str) -> int | None:
    """Build a network without storage, in a process with limits on memory and time, and count its values.

    Args:
        build: Returns the network.
        origin: Where the description comes from, for messages.

    Returns:
        Number of values of parameters and buffers; None if the network cannot be built without storage.

    Raises:
        NotBuildable: ``build`` raises an error.
        ConfigurationError: The process has reached a limit.
    """

    def count() -> int:
        with unset_fake_temporarily(), torch.device("meta"):
            network = build()
        return sum(tensor.numel() for tensor in (*network.parameters(), *network.buffers()))

    try:
        values = call_limited(count, _MEMORY_BYTES, _SECONDS)
    except LimitExceeded as error:
        raise ConfigurationError(
            f"{origin} describes a network that is too large to be counted: {error}; lower its sizes"
        ) from error
    except RuntimeError as error:
        if "meta tensor" in str(error):
            return None
        reason = str(error).removeprefix("Fault: ")
        hint = "" if reason != str(error) else "; change its sizes"
        raise NotBuildable(f"{origin} describes no network that can be built: {reason}{hint}") from error
    return values


def check_memory(values: int | None, dtype: torch.dtype, origin: str) -> None:
    """Refuse a network of more than :data:`MOST_VALUES` values, or one larger than the memory of the default device.

    Args:
        values: Number of values; None if it is unknown.
        dtype: Dtype of the values.
        origin: Where the description comes from, for messages.

    Raises:
        ConfigurationError: The message gives both sizes.
    """
    if values is None:
        return
    if values > MOST_VALUES:
        raise ConfigurationError(
            f"{origin} describes a network of {values:,} values, more than {MOST_VALUES:,}; lower its sizes"
        )
    fake = detect_fake_mode() is not None  # tensors then have no storage
    available = None if fake else total_bytes(torch.get_default_device())
    if available is not None and values * dtype.itemsize > available:
        needed = f"{values * dtype.itemsize / 2**30:,.1f} GiB in {dtype}"
        raise ConfigurationError(
            f"{origin} describes a network of {values:,} values, {needed}; this machine has {available / 2**30:,.1f} "
            "GiB: take a smaller network"
        )


@functools.cache
def _count_described(model_type: str, config: str) -> int | None:
    def build() -> nn.Module:
        from transformers import CONFIG_MAPPING, AutoModelForCausalLM

        given = json.loads(config)
        try:
            built = CONFIG_MAPPING[model_type](**given)
        except Exception as error:
            cause = error.__cause__ or error  # the message of huggingface_hub itself begins with names of its own
            raise Fault(f"{type(cause).__name__}: {first_line(cause)}") from error
        try:
            network = AutoModelForCausalLM.from_config(built)
            compute_row(network)
        except Exception as error:
            if fault := find_fault(built, given, error):
                raise Fault(fault) from error
            if not (left := sizes_not_given(model_type, given)) or not isinstance(error, RuntimeError):
                raise
            raise RuntimeError(f"{first_line(error)}; change its sizes, of which these are defaults: {left}") from error
        return network

    return count_values(build, f"the {model_type} configuration")


def count_described(model_type: str, config: dict[str, Any]) -> int | None:
    """Return the number of values of a causal language model. A process counts each configuration once.

    Raises:
        ConfigurationError: As :func:`count_values`; or the configuration holds a value that is not plain.
    """
    try:
        text = json.dumps(config, sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"the {model_type} configuration holds more than plain values: {error}") from error
    return _count_described(model_type, text)
