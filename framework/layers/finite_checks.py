"""Checks that rotations are finite before they are folded: one layer at once, or many layers with a single wait."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from orthotrain.devices.host_reads import LateValues, read_waits
from orthotrain.errors import TrainingDiverged

Displacements = tuple[Tensor | None, Tensor | None]

LARGEST_DISPLACEMENT = 1e12
"""Entries of ``R - I`` are at most 2. A series that has diverged gives huge entries, and their products overflow."""


class FiniteChecks:
    """Collects the checks of many layers, so that the host waits for a device once, or not at all.

    On a CPU each layer is checked at once. On other devices a layer with rotations that are not finite keeps its
    weight; the host reads the results later and raises the error then.
    """

    def __init__(self) -> None:
        self._noted: list[tuple[str, Tensor]] = []
        self._failures: list[str] = []
        self._layer = ""
        self._sent: LateValues | None = None

    @contextmanager
    def of(self, layer: str) -> Iterator[None]:
        """Collect the checks of :func:`finite_or_zero` inside the ``with`` block; errors get the name of the layer."""
        token, self._layer = _CHECKS.set(self), layer
        try:
            yield
        except TrainingDiverged as error:
            raise TrainingDiverged(f"{layer}: {error}") from error
        finally:
            _CHECKS.reset(token)

    def note(self, finite: Tensor, error: str) -> None:
        """Note whether rotations are finite, a bool ``()`` on the device, and the error if they are not."""
        self._noted.append((f"{self._layer}: {error}", finite))

    def send(self) -> "FiniteChecks":
        """Start to copy all results to the host; reading them a step later does not make the host wait."""
        if self._noted:
            device = self._noted[0][1].device
            self._sent = LateValues(torch.stack([finite.to(device) for _, finite in self._noted]))
        return self

    def failures(self) -> list[str]:
        """Return the errors of the layers whose rotations were not finite, from the results that were sent."""
        if self._sent is not None:
            results, self._sent = self._sent.tolist(), None
            self._failures = [error for (error, _), finite in zip(self._noted, results, strict=True) if not finite]
        return self._failures

    def raise_errors(self) -> None:
        """Read the results that were sent.

        Raises:
            TrainingDiverged: If the rotations of a layer were not finite, naming the layer.
        """
        if self.failures():
            raise TrainingDiverged(self.failures()[0])


_CHECKS: ContextVar[FiniteChecks | None] = ContextVar("checks", default=None)


def finite_or_zero(displacements: Displacements, error: Callable[[], str]) -> Displacements:
    """Return displacements of a layer that are about to be folded, if they are finite and not huge.

    Args:
        displacements: ``D = R - I`` ``(n, b, b)`` of each side, None for a side that is not folded.
        error: Returns the message.

    Returns:
        The displacements. On a device whose results :class:`FiniteChecks` collects: zeros where they are not finite, so
        that the fold leaves the weight as it is.

    Raises:
        TrainingDiverged: If they are not finite and the host checks at once.
    """
    norms = [torch.linalg.vector_norm(d, torch.inf) for d in displacements if d is not None]
    if not norms:
        return displacements
    finite, checks = (torch.stack(norms) < LARGEST_DISPLACEMENT).all(), _CHECKS.get()
    if checks is not None and read_waits(finite.device):
        checks.note(finite, error())
        out, into = (None if d is None else d.masked_fill(~finite, 0) for d in displacements)
        return out, into
    if not bool(finite):
        raise TrainingDiverged(error())
    return displacements
