"""How large a described network is, found out before it is built: a number in a configuration may ask for anything."""

import functools
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import unset_fake_temporarily

from orthotrain.console.limited_process import LimitExceeded, call_limited
from orthotrain.devices.memory import total_bytes
from orthotrain.errors import ConfigurationError

MOST_VALUES = 10**13
"""Most values of a network: ten times those of the largest that anybody has trained."""
_MEMORY_BYTES, _SECONDS = 512 << 20, 20.0


class NotBuildable(ConfigurationError):
    """A description from which no network can be built."""


def count_values(build: Callable[[], nn.Module], what: str) -> int | None:
    """Build a network without storage, in a process of bounded memory and time, and count its values.

    Args:
        build: Returns the network.
        what: What describes it, for messages.

    Returns:
        The number of values of parameters and buffers; None where the network cannot be built without storage.

    Raises:
        NotBuildable: Building the network raises an error.
        ConfigurationError: The network has more layers than can be counted.
    """

    def count() -> int:
        with unset_fake_temporarily(), torch.device("meta"):
            network = build()
        return sum(tensor.numel() for tensor in (*network.parameters(), *network.buffers()))

    try:
        values = call_limited(count, _MEMORY_BYTES, _SECONDS)
    except LimitExceeded as error:
        raise ConfigurationError(
            f"{what} describes a network that is too large to be counted: {error}; lower its sizes"
        ) from error
    except RuntimeError as error:
        if "meta tensor" in str(error):
            return None
        raise NotBuildable(f"{what} describes no network that can be built: {error}; change its sizes") from error
    return values


def check_memory(values: int | None, dtype: torch.dtype, what: str) -> None:
    """Refuse a network beyond `MOST_VALUES`, or that the memory of the default device cannot hold.

    Args:
        values: How many values it has; None if that is not known.
        dtype: Of the values.
        what: What describes it, for messages.

    Raises:
        ConfigurationError: Naming the sizes of both.
    """
    if values is not None and values > MOST_VALUES:
        raise ConfigurationError(
            f"{what} describes a network of {values:,} values, more than {MOST_VALUES:,}; lower its sizes"
        )
    available = _memory()
    if values is not None and available is not None and values * dtype.itemsize > available:
        raise ConfigurationError(
            f"{what} describes a network of {values:,} values, {values * dtype.itemsize / 2**30:,.1f} GiB in {dtype}; "
            f"this machine has {available / 2**30:,.1f} GiB: take a smaller one"
        )


def _memory() -> int | None:
    """Bytes of the default device; None where tensors have no storage."""
    device = torch.get_default_device()
    return None if detect_fake_mode() is not None else total_bytes(device)


@functools.cache
def _count_described(model_type: str, config: str) -> int | None:
    def build() -> nn.Module:
        from transformers import CONFIG_MAPPING, AutoModelForCausalLM

        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**json.loads(config)))

    return count_values(build, f"the {model_type} configuration")


def count_described(model_type: str, config: dict[str, Any]) -> int | None:
    """Return the values of a causal language model by its configuration; counted once in a process.

    Raises:
        ConfigurationError: See :func:`count_values`; or a value of the configuration that is not plain.
    """
    try:
        text = json.dumps(config, sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"the {model_type} configuration holds more than plain values: {error}") from error
    return _count_described(model_type, text)
