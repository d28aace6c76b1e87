"""Permutations of groups of neighbouring features.

An order of ``d`` features is ``(d / g,)`` int64: place ``i`` holds group ``order[i]``, which is the features from ``g
order[i]`` to ``g order[i] + g - 1``, with ``g`` of 1, 2, 4 or 8. Memory is read in pieces of 16 bytes, not of 2.
"""

from typing import overload

import torch
from torch import Tensor

GROUPS = (8, 4, 2, 1)
"""Features that may move together: 8 of 16 bits are the widest load of a GPU's thread, and a CPU's widest integer."""


def group_of(order: Tensor | None, width: int) -> int:
    """Return how many neighbouring features an order of ``width`` of them moves together, 1 without an order."""
    return 1 if order is None or not order.shape[0] else width // order.shape[0]


@overload
def by_feature(order: None, width: int) -> None: ...
@overload
def by_feature(order: Tensor, width: int) -> Tensor: ...
def by_feature(order: Tensor | None, width: int) -> Tensor | None:
    """Return an order of groups as one of single features, ``(width,)``."""
    return None if order is None else spread(order, group_of(order, width))


def spread(order: Tensor, group: int) -> Tensor:
    """Return ``g order[i] .. g order[i] + g - 1`` for every ``i``: ``(n,) -> (n g,)``."""
    if group == 1:
        return order
    return (order[:, None] * group + torch.arange(group, device=order.device)).flatten()
