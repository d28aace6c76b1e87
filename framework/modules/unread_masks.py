"""Forward passes of transformers that read no value of an attention mask or of positions from the device.

To choose a faster attention, transformers asks in each forward pass whether the rows are packed, by positions that the
network has just made itself, and whether a padding mask is all ones (masking_utils.py of 5.17 to 5.23). Each answer is
read from the device, and no option turns that off. Both answers are known on the host: so the questions are answered
here, by replacing three functions of that file while a network is called. Upstream the reads are "dynamic control flow"
by design. This file goes when transformers takes the answers as arguments.
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
def unread_masks(network: nn.Module, inputs: dict[str, Any]) -> Iterator[None]:
    """Let a network of transformers compute its attention masks without reading values, as long as ``with`` lasts.

    Rows without ``position_ids`` are not packed, and rows with them count as packed. A padding mask counts as one with
    padding, unless :class:`~orthotrain.data.InstructionData` has marked it: then the network is called without it.

    Args:
        network: What is called.
        inputs: What it is called with, by name; a mask that is marked is taken out.
    """
    masking, modeling = (sys.modules.get(f"transformers.{name}") for name in ("masking_utils", "modeling_utils"))
    takes_none = modeling is not None and isinstance(network, modeling.PreTrainedModel)
    if takes_none and marked_ones(inputs.get("attention_mask")):
        del inputs["attention_mask"]
    replaced: dict[str, Callable[..., Any]] = {}
    if masking is not None and hasattr(masking, _FIND_PACKED):
        given = inputs.get("position_ids") is not None
        replaced[_FIND_PACKED] = sequences_of if given else lambda position_ids: None
    for name in _IGNORE_MASK if masking is not None else ():
        if hasattr(masking, name):
            replaced[name] = _unless_padded(getattr(masking, name))
    before = {name: getattr(masking, name) for name in replaced}
    for name, function in replaced.items():
        setattr(masking, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(masking, name, function)


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
