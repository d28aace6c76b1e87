"""Outputs that may be changed in place, as those of nn.Linear may: ``relu_``, ``out += x``, ``out[0] = 0``."""

import torch
from torch import Tensor


def unviewed(output: Tensor) -> Tensor:
    """Return the result of an autograd function as a tensor that is no view, with the same memory.

    torch refuses to change a view in place that an autograd function has made. ``F.linear`` with a bias, for example,
    returns a view for an input of three dimensions.

    Args:
        output: A new tensor, whose memory nothing else reads.
    """
    # a trace has no such views
    if torch.compiler.is_compiling() or not output._is_view():
        return output
    return output.data


class Changes:
    """Tells whether a tensor was changed in place later, without keeping its memory alive.

    ``save_for_backward`` refuses a tensor that was changed in place; its ``data`` has the same memory and a version of
    its own.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._probe = tensor.detach()  # shares the version count
        self._probe.data = tensor.new_empty(0)
        self._version = self._probe._version

    def any(self) -> bool:
        """Return whether the tensor has another version than when this object was made."""
        return self._probe._version != self._version
