"""Values of a device that the host reads: a read waits until the device has computed all that was asked of it."""

from typing import Any

import torch
from torch import Tensor


def read_waits(device: torch.device) -> bool:
    """Tell whether the host waits when it reads a value of this device; a value of the CPU is there at once."""
    return device.type not in ("cpu", "meta")


def host_number(value: float) -> Tensor:
    """Return a number as a tensor on the CPU, for ``LightningModule.log``.

    Lightning copies a Python number to the device of the module and waits for the copy. A progress bar then reads the
    number back at every step.
    """
    return torch.tensor(value, dtype=torch.float32, device="cpu")


class LateValues:
    """The values of a small tensor, copied to the host while the device goes on.

    The host reads the values a step later. By then the device has passed the place of the copy, and still has the work
    of the next step. On a CPU the values can be read at once. A device without streams (MPS) is waited for.

    Args:
        values: Any tensor.
    """

    def __init__(self, values: Tensor) -> None:
        self._values, self._copied = values.detach(), None
        stream: Any = getattr(torch.get_device_module(values.device), "current_stream", None)
        if read_waits(values.device) and stream is not None:
            # into memory that is not pinned CUDA does not copy in the background
            pinned = values.is_cuda
            self._values = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=pinned)
            self._values.copy_(values.detach(), non_blocking=True)
            self._copied = stream(values.device).record_event()

    def tolist(self) -> Any:
        """Return the values, once the copy is complete."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.tolist()


class HostCount:
    """The value of a count that is a buffer of a layer, read from a device only after something else has changed it."""

    def __init__(self) -> None:
        self._known: tuple[Tensor, int, int] | None = None

    def read(self, buffer: Tensor) -> int:
        """Return the value of the buffer, an integer ``()``."""
        if not read_waits(buffer.device) or buffer.is_inference():  # an inference tensor does not count its changes
            return int(buffer)
        if self._known is None or self._known[0] is not buffer or self._known[1] != buffer._version:
            self._known = (buffer, buffer._version, int(buffer))
        return self._known[2]

    def advance(self, buffer: Tensor) -> int:
        """Add one to the buffer and return the new value."""
        value = self.read(buffer) + 1
        buffer += 1
        if read_waits(buffer.device) and not buffer.is_inference():
            self._known = (buffer, buffer._version, value)
        return value


def is_ones(mask: Any) -> bool:
    """Tell whether a padding mask ``(B, T)`` of the CPU, of integers or bools, holds ones alone."""
    known = isinstance(mask, Tensor) and mask.device.type == "cpu" and mask.ndim == 2
    return known and not mask.is_floating_point() and bool((mask == 1).all())


def mark_ones(mask: Tensor) -> None:
    """Note that a mask holds ones alone, for :func:`marked_ones`."""
    mask.holds_ones = True  # type: ignore[attr-defined]


def marked_ones(mask: Any) -> bool:
    """Tell whether a mask is known to hold ones alone."""
    return getattr(mask, "holds_ones", False)
