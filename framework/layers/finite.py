"""Weights that are looked at before they are stored: each at once, or those of many layers with one wait."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from orthotrain.devices.host_reads import LateValues, read_waits
from orthotrain.errors import TrainingDiverged


class FiniteLooks:
    """Looks at the new weights of many layers: on a CPU at each at once, on a device at all of them together.

    A weight that is not looked at yet is stored only where it is finite: the device itself keeps the old one elsewhere.
    """

    def __init__(self) -> None:
        self._finite: list[Tensor] = []
        self._errors: list[str] = []
        self._layer = ""
        self._sent: LateValues | None = None

    @contextmanager
    def of(self, layer: str) -> Iterator[None]:
        """Let :func:`finite_or` note its look here; name the layer in the error of one that does not know its name."""
        token, self._layer = _LOOKS.set(self), layer
        try:
            yield
        except TrainingDiverged as error:
            raise TrainingDiverged(f"{layer}: {error}") from error
        finally:
            _LOOKS.reset(token)

    def note(self, finite: Tensor, error: str) -> None:
        """Note whether a weight is finite, a bool ``()`` of the device, and the error if not."""
        self._finite.append(finite)
        self._errors.append(f"{self._layer}: {error}")

    def send(self) -> "FiniteLooks":
        """Begin to copy all that was noted to the host, which does not wait if it looks a step later."""
        if self._finite:
            device = self._finite[0].device
            self._sent = LateValues(torch.stack([finite.to(device) for finite in self._finite]))
        return self

    def look(self) -> None:
        """Read what was sent.

        Raises:
            TrainingDiverged: If a weight was not finite, naming its layer.
        """
        sent, self._sent = self._sent, None
        found = [] if sent is None else sent.tolist()
        if not all(found):
            raise TrainingDiverged(self._errors[found.index(False)])


_LOOKS: ContextVar[FiniteLooks | None] = ContextVar("looks", default=None)


def finite_or(weight: Tensor, old: Callable[[], Tensor], error: str) -> Tensor:
    """Return ``weight`` if it is finite.

    Args:
        weight: The new weight.
        old: Returns what to store in place of it while :class:`FiniteLooks` puts the look off.
        error: The message.

    Raises:
        TrainingDiverged: If the weight is looked at here and is not finite.
    """
    finite, looks = torch.isfinite(weight).all(), _LOOKS.get()
    if looks is not None and read_waits(weight.device):
        looks.note(finite, error)
        return torch.where(finite, weight, old())
    if not bool(finite):
        raise TrainingDiverged(error)
    return weight


LARGEST_DISPLACEMENT = 1e12
"""Entries of R - I are at most 2. Those of a series that has diverged may be huge, and their products infinite."""


def is_sound(displacement: Tensor) -> Tensor:
    """Return whether ``D = R - I`` is finite and not huge, a bool ``()`` of its device."""
    return torch.linalg.vector_norm(displacement, torch.inf) < LARGEST_DISPLACEMENT
