"""Adapters: what finetuning has learned, as plain tensors by name, and several of them on one network.

An adapter is a dictionary from parameter names to tensors: the generators of every OFT layer, and whatever else is
trained (biases, norms, a head). It does not say how its generators are to be read: block sizes and parameterizations
are those of the network it is loaded into.
"""

from orthotrain.adapters.adapter_set import AdapterSet
from orthotrain.adapters.state import (
    OftLayer,
    adapter_parameters,
    adapter_state,
    load_adapter,
    load_adapter_state,
    oft_layers,
    rotation_of,
)

__all__ = [
    "AdapterSet",
    "OftLayer",
    "adapter_parameters",
    "adapter_state",
    "load_adapter",
    "load_adapter_state",
    "oft_layers",
    "rotation_of",
]
