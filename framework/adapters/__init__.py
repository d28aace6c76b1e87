"""Adapters: the trained tensors of a finetuned network by name; several adapters on one network; PEFT's format.

An adapter is a dictionary from parameter names to tensors: the generators of all OFT layers, and all other trained
parameters (biases, norms, a head). It does not store block sizes and parameterizations: these are the settings of the
network into which it is loaded.

Adapters can be written and read in the format of PEFT. PEFT rotates row vectors, as orthotrain does, so that the
generators are the same. PEFT's Cayley-Neumann series of t terms is orthotrain's order t - 2 for t >= 4, and order 2 for
t = 3. PEFT's exact Cayley transform is ``(I - Q)(I + Q)^-1``, which is orthotrain's at ``-Q``: there the generators
change their sign. Layers have their names in the network, after ``base_model.model``.
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
    unload,
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
    "unload",
]
