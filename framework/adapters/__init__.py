"""Adapters: what finetuning has learned, as plain tensors by name, and several of them on one network.

An adapter is a dictionary from parameter names to tensors: the generators of every OFT layer, and whatever else is
trained (biases, norms, a head). It does not say how its generators are to be read: block sizes and parameterizations
are those of the network it is loaded into.

PEFT's adapters are written and read too. PEFT rotates row vectors as we do, so generators go over as they are. Its
Cayley-Neumann series of t terms is our order t - 2 for t >= 4, and three terms are order 2 too. Its exact Cayley
transform is ``(I - Q)(I + Q)^-1``, ours at ``-Q``: there the generators change sign. Layers are called by their names
in the network, below ``base_model.model``.
"""

from orthotrain.adapters.adapter_set import AdapterSet
from orthotrain.adapters.peft_export import export_peft
from orthotrain.adapters.peft_import import import_peft
from orthotrain.adapters.state import (
    adapter_parameters,
    adapter_state,
    load_adapter,
    load_adapter_state,
    oft_layers,
)

__all__ = [
    "AdapterSet",
    "adapter_parameters",
    "adapter_state",
    "export_peft",
    "import_peft",
    "load_adapter",
    "load_adapter_state",
    "oft_layers",
]
