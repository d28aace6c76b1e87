"""What surrounds every operation: its device is the current one, autocast stays outside, results are as declared."""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor


@contextlib.contextmanager
def guarded(tensor: Tensor) -> Iterator[None]:
    """Make the device of a tensor current, where Triton launches its kernels, and turn autocast off for it."""
    with torch.cuda.device_of(tensor), without_autocast(tensor.device.type):
        yield


def without_autocast(device: str) -> AbstractContextManager[object]:
    """Turn autocast off for a type of device, where it is on: to enter it costs 10 us in every pass of every layer."""
    # torch.compile of torch 2.11 cannot trace whether a device has autocast; those that it compiles for have it
    known = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device)
    if known and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def returned(gradient: Tensor | None, like: Tensor) -> Tensor:
    """Return a gradient as an op declares it, which returns tensors, never None: contiguous, empty if not needed."""
    return like.new_empty(0) if gradient is None else gradient.contiguous()
