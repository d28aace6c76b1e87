"""Forward passes of transformers that read no value of an attention mask or of positions from the device.

To choose a faster attention, transformers asks in each forward pass whether the rows are packed (by positions that the
network has just made itself) and whether a padding mask is all ones (masking_utils.py of 5.17 to 5.23). Each answer is
read from the device, for which the host waits, and no option turns this off. The host knows both answers. While a
network is called, three functions of that file are therefore replaced by functions that give the answers. The
maintainers of transformers call the reads "dynamic control flow" and keep them by design. This file goes when
transformers takes the answers as arguments.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from orthotrain.devices.host_reads import marked_ones

_FIND_PACKED = "find_packed_sequence_indices"
_IGNORE_MASK = ("_ignore_causal_mask_sdpa", "_ignore_bidirectional_mask_sdpa")


@contextmanager
def masks_without_reads(network: nn.Module, inputs: dict[str, Any]) -> Iterator[None]:
    """While the ``with`` block lasts, let a network of transformers compute its attention masks without reading values.

    Rows without ``position_ids`` count as not packed, rows with them as packed. A padding mask counts as one with
    padding, unless :class:`~orthotrain.data.InstructionData` has marked it as all ones: such a mask is left out.

    Args:
        network: The network to be called.
        inputs: Its inputs by name; a mask that is marked is removed from them.
    """
    masking, modeling = (sys.modules.get(f"transformers.{name}") for name in ("masking_utils", "modeling_utils"))
    is_transformers = modeling is not None and isinstance(network, modeling.PreTrainedModel)
    if is_transformers and marked_ones(inputs.get("attention_mask")):
        del inputs["attention_mask"]
    packed = inputs.get("position_ids") is not None
    functions = {} if masking is None else vars(masking)
    originals = {name: functions[name] for name in (_FIND_PACKED, *_IGNORE_MASK) if name in functions}
    for name, original in originals.items():
        functions[name] = _unless_padded(original)
    if _FIND_PACKED in originals:
        functions[_FIND_PACKED] = sequences_of if packed else lambda position_ids: None
    try:
        yield
    finally:
        functions.update(originals)


def sequences_of(position_ids: Tensor) -> Tensor:
    """Return the number of the sequence that each token of packed rows belongs to, from 0 in each row.

    Args:
        position_ids: Shape ``(B, T)``; a sequence ends where the next position is not one more.
    """
    begins = torch.zeros_like(position_ids)
    begins[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    return begins.cumsum(-1)


def _unless_padded(ignores: Callable[..., bool]) -> Callable[..., bool]:
    def ignore(padding_mask: Tensor | None, *args: Any, **kwargs: Any) -> bool:
        return padding_mask is None and ignores(padding_mask, *args, **kwargs)

    return ignore
