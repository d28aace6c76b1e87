"""PEFT adapters in and out, and how the two read the same generators.

PEFT rotates row vectors as we do, so generators go over as they are. Its Cayley-Neumann series of t terms is our order
t - 2 for t >= 4, and three terms are order 2 too. Its exact Cayley transform is ``(I - Q)(I + Q)^-1``, ours at ``-Q``:
there the generators change sign. Layers are called by their names in the network, below ``base_model.model``.
"""

from orthotrain.adapters.peft_export import export_peft
from orthotrain.adapters.peft_import import import_peft

__all__ = ["export_peft", "import_peft"]
