"""Stochastic rounding with noise from a hash: the same bits on every device and rank."""

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from orthotrain.seeding import derive_seed

LEVELS = 1 << 16
"""Number of values of the noise, which has 16 bits."""

HASHED, PACKED = {"cpu": 1 << 17}, {"cpu": 1 << 20}
"""Number of values that are hashed, and packed, at a time, by type of device: on a CPU they fit into its cache."""
OTHERWISE = 1 << 24


class Noise:
    """Uniform noise for one rounding of one matrix: a hash of (seed, row, column), without a state.

    A random generator would draw different numbers on each type of device, and a generator of the CPU would make the
    device wait at every fold. The hash is two rounds of multiplication and shift of (hashed row) xor (hashed column),
    with the constants of least bias that C. Wellons found by search ("hash-prospector").

    Args:
        parts: Words and integers that determine the noise, hashed by :func:`~orthotrain.seeding.derive_seed`.
    """

    def __init__(self, *parts: str | int) -> None:
        seed = derive_seed(*parts)
        self._row_key, self._column_key, self._first = _signed(seed), _signed(seed >> 31), 0

    def below(self, row: int) -> "Noise":
        """Return the noise of the rows from ``row`` on, to round a matrix in parts."""
        rest = copy.copy(self)
        rest._first += row
        return rest

    def draw(self, shape: Sequence[int], device: torch.device | str) -> Tensor:
        """Return int32 noise from 0 to 65535 of a shape ``(..., columns)`` on a device."""
        columns = shape[-1]
        rows = math.prod(shape[:-1])
        row = self._hashes(self._first, rows, self._row_key, device)
        column = self._hashes(0, columns, self._column_key, device)
        noise = torch.empty(rows, columns, dtype=torch.int32, device=device)
        step = max(1, HASHED.get(torch.device(device).type, OTHERWISE) // max(1, columns))
        for start in range(0, rows, step):
            part = noise[start : start + step]
            torch.bitwise_xor(row[start : start + step, None], column, out=part)
            _mix_(part).bitwise_right_shift_(16).bitwise_and_(LEVELS - 1)
        return noise.view(*shape)

    def _hashes(self, first: int, count: int, key: int, device: torch.device | str) -> Tensor:
        return _mix_(torch.arange(first, first + count, dtype=torch.int32, device=device).bitwise_xor_(key))


def in_parts(
    pack: Callable[[slice, Noise | None], dict[str, Tensor]], weight: Tensor, noise: Noise | None, multiple: int = 1
) -> dict[str, Tensor]:
    """Pack ``weight (out, in)`` some rows at a time, to keep the fp32 intermediate values small.

    Args:
        pack: Returns the packed tensors of some rows, whose first dimensions run along the rows.
        weight: The weight to pack.
        noise: Noise for ``pack``; None to round to nearest.
        multiple: Number of rows that must be packed together.
    """
    count, columns = weight.shape
    step = max(1, PACKED.get(weight.device.type, OTHERWISE) // max(1, columns * multiple)) * multiple
    parts = [
        pack(slice(start, min(count, start + step)), None if noise is None else noise.below(start))
        for start in range(0, max(count, 1), step)
    ]
    return parts[0] if len(parts) == 1 else {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def round_steps(steps: Tensor, noise: Noise | None) -> Tensor:
    """Round ``steps (..., columns)`` to whole numbers: to the nearest, or with noise up or down, unbiased."""
    if noise is None:
        return steps.round()
    drawn = noise.draw(steps.shape, steps.device).to(steps.dtype)
    return drawn.add_(0.5).mul_(1 / LEVELS).add_(steps).floor_()


def stochastic_round(x: Tensor, noise: Noise) -> Tensor:
    """Round fp32 to bf16 up or down with the probability that makes the expectation exact.

    bf16 is the upper half of fp32. Adding 16 random bits to the lower half and cutting the lower half off rounds up
    with that probability. Exactly representable values, infinities and NaN do not change.

    Args:
        x: fp32 (or wider, then first rounded to fp32), any shape.
        noise: The noise of this rounding.
    """
    bits = x.float().contiguous().view(torch.int32)
    rounded = noise.draw(bits.shape, bits.device).add_(bits).bitwise_and_(-LEVELS).view(torch.float32)
    return torch.where(torch.isfinite(x), rounded, x).to(torch.bfloat16)


def _mix_(x: Tensor) -> Tensor:
    """Hash int32 numbers in place; products wrap around, and the sign bits of shifts are masked."""
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        high = torch.bitwise_right_shift(x, shift).bitwise_and_((1 << (32 - shift)) - 1)
        x.bitwise_xor_(high).mul_(factor)
    return x


def _signed(word: int) -> int:
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >> 31 else word
