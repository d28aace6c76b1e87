"""Learning-rate schedules that learn the length of the run from the trainer."""

import math
from abc import ABC, abstractmethod
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from orthotrain.errors import ConfigurationError


class RunSchedule(LRScheduler, ABC):
    """Linear warm-up, then what a subclass makes of the rest of the run.

    The length is that of this run, also after a resume: a checkpoint goes on to another end than it was made for.

    Args:
        optimizer: Its groups' ``lr`` are the base rates.
        warmup_steps: Steps of the linear rise; 0 starts at the full rate.
        final_ratio: Rate at the end over the base rate.
        total_steps: Length in optimizer steps; None lets the module fill in the trainer's.

    Raises:
        ConfigurationError: If a number is out of its range.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int, final_ratio: float, total_steps: int | None) -> None:
        if warmup_steps < 0 or not 0 <= final_ratio <= 1:
            raise ConfigurationError(
                f"warmup_steps={warmup_steps}, final_ratio={final_ratio}: the first must be 0 or more, "
                "the second from 0 to 1"
            )
        self.warmup_steps = warmup_steps
        self.final_ratio = final_ratio
        self.total_steps = total_steps
        super().__init__(optimizer)

    @abstractmethod
    def after_warmup(self, progress: float) -> float:
        """Return the rate over the base rate at ``progress`` from 0 (end of warm-up) to 1 (end of the run)."""

    def factor(self, step: int) -> float:
        """Return the rate at ``step`` (from 0) over the base rate."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.total_steps is None:
            return 1.0
        span = max(1, self.total_steps - self.warmup_steps)
        return self.after_warmup(min(1.0, (step - self.warmup_steps) / span))

    def state_dict(self) -> dict[str, Any]:
        """Return the state without the length, which belongs to the run and not to the checkpoint."""
        return {name: value for name, value in super().state_dict().items() if name != "total_steps"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state; the length stays that of this run."""
        super().load_state_dict({**state_dict, "total_steps": self.total_steps})

    def get_lr(self) -> list[float]:  # type: ignore[override]
        """Return the rate of each group for the next optimizer step."""
        return [float(base) * self.factor(self.last_epoch) for base in self.base_lrs]


class CosineWithWarmup(RunSchedule):
    """Linear warm-up, then a cosine from the base rate to ``final_ratio`` of it at the end.

    Args:
        optimizer: Its groups' ``lr`` are the base rates.
        warmup_steps: Steps of the linear rise; 0 starts at the full rate.
        final_ratio: Rate at the end over the base rate (arXiv:2506.08001 uses 0.01).
        total_steps: Length in optimizer steps; None lets the module fill in the trainer's.

    Raises:
        ConfigurationError: If a number is out of its range.
    """

    def __init__(
        self, optimizer: Optimizer, warmup_steps: int = 0, final_ratio: float = 0.01, total_steps: int | None = None
    ) -> None:
        super().__init__(optimizer, warmup_steps, final_ratio, total_steps)

    def after_warmup(self, progress: float) -> float:
        """Return the cosine's value."""
        return self.final_ratio + (1 - self.final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


class WarmupStableDecay(RunSchedule):
    """Linear warm-up, a constant rate, and a linear fall to ``final_ratio`` of it over the last part of the run.

    Source: MiniCPM (arXiv:2404.06395, section 4). The length of a run need not be known before it decays: a checkpoint
    of the constant part goes on for as long as the ``max_steps`` it is resumed with say.

    Args:
        optimizer: Its groups' ``lr`` are the base rates.
        warmup_steps: Steps of the linear rise; 0 starts at the full rate.
        decay_fraction: Part of the steps after the warm-up in which the rate falls, in (0, 1].
        final_ratio: Rate at the end over the base rate.
        total_steps: Length in optimizer steps; None lets the module fill in the trainer's.

    Raises:
        ConfigurationError: If a number is out of its range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int = 0,
        decay_fraction: float = 0.2,
        final_ratio: float = 0.01,
        total_steps: int | None = None,
    ) -> None:
        if not 0 < decay_fraction <= 1:
            raise ConfigurationError(f"decay_fraction={decay_fraction}: take a part of the run above 0 and up to 1")
        self.decay_fraction = decay_fraction
        super().__init__(optimizer, warmup_steps, final_ratio, total_steps)

    def after_warmup(self, progress: float) -> float:
        """Return 1, then the line to ``final_ratio``."""
        fallen = max(0.0, (progress - (1 - self.decay_fraction)) / self.decay_fraction)
        return 1 - (1 - self.final_ratio) * fallen
