"""Reads of device values by the host, each of which waits until the device has finished all earlier work."""

from typing import Any

import torch
from torch import Tensor


def read_waits(device: torch.device) -> bool:
    """Tell whether the host waits when it reads a value of this device; it does not wait for the CPU."""
    return device.type not in ("cpu", "meta")


def host_number(value: float) -> Tensor:
    """Return a number as a tensor on the CPU, for ``LightningModule.log``.

    Lightning would copy a Python number to the device of the module and wait for the copy. A progress bar would then
    read the number back at every step.
    """
    return torch.tensor(value, dtype=torch.float32, device="cpu")


class LateValues:
    """The values of a small tensor, copied to the host while the device continues.

    The host reads the values one step later. By then the device has finished the copy and works on the next step. On a
    CPU the values can be read at once. A device without streams (MPS) makes the host wait.

    Args:
        values: Any tensor.
    """

    def __init__(self, values: Tensor) -> None:
        self._values, self._copied = values.detach(), None
        stream: Any = getattr(torch.get_device_module(values.device), "current_stream", None)
        if read_waits(values.device) and stream is not None:
            # CUDA copies in the background only into pinned memory
            pinned = values.is_cuda
            self._values = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=pinned)
            self._values.copy_(values.detach(), non_blocking=True)
            self._copied = stream(values.device).record_event()

    def tolist(self) -> Any:
        """Wait for the copy and return the values."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.tolist()


class HostCount:
    """The value of a buffer that counts, read from the device only after other code has changed the buffer."""

    def __init__(self) -> None:
        self._known: tuple[Tensor, int, int] | None = None

    def read(self, buffer: Tensor) -> int:
        """Return the value of the buffer, an integer ``()``."""
        if not read_waits(buffer.device) or buffer.is_inference():  # an inference tensor has no version
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
    """Tell whether a padding mask ``(B, T)`` of integers or bools on the CPU has only ones."""
    known = isinstance(mask, Tensor) and mask.device.type == "cpu" and mask.ndim == 2
    return known and not mask.is_floating_point() and bool((mask == 1).all())


def mark_ones(mask: Tensor) -> None:
    """Mark a mask that has only ones, for :func:`marked_ones`."""
    mask.holds_ones = True  # type: ignore[attr-defined]


def marked_ones(mask: Any) -> bool:
    """Tell whether :func:`mark_ones` has marked a mask."""
    return getattr(mask, "holds_ones", False)
