"""Learning-rate schedules whose length is the length of the run."""

import math
from abc import ABC, abstractmethod
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from orthotrain.errors import ConfigurationError


class RunSchedule(LRScheduler, ABC):
    """Linear warm-up, then the rate that a subclass computes.

    After a resume the length is that of the new run, which may be longer or shorter than the run of the checkpoint.

    Args:
        optimizer: The ``lr`` of its groups are the base rates.
        warmup_steps: Steps of the linear warm-up; 0 starts at the full rate.
        final_ratio: Rate at the end divided by the base rate.
        total_steps: Length in optimizer steps; None for the length that the trainer computes.

    Raises:
        ConfigurationError: If a number is out of its range.
    """

    def __init__(self, optimizer: Optimizer, warmup_steps: int, final_ratio: float, total_steps: int | None) -> None:
        if warmup_steps < 0 or not 0 <= final_ratio <= 1:
            raise ConfigurationError(
                f"warmup_steps={warmup_steps}, final_ratio={final_ratio}: warmup_steps must be 0 or more, "
                "final_ratio from 0 to 1"
            )
        self.warmup_steps = warmup_steps
        self.final_ratio = final_ratio
        self.total_steps = total_steps
        super().__init__(optimizer)

    @abstractmethod
    def after_warmup(self, progress: float) -> float:
        """Return the rate divided by the base rate at ``progress``, from 0 (end of warm-up) to 1 (end of the run)."""

    def factor(self, step: int) -> float:
        """Return the rate at ``step`` (from 0) divided by the base rate."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.total_steps is None:
            return 1.0
        span = max(1, self.total_steps - self.warmup_steps)
        return self.after_warmup(min(1.0, (step - self.warmup_steps) / span))

    def state_dict(self) -> dict[str, Any]:
        """Return the state without the length, which is a property of the run and not of the checkpoint."""
        return {name: value for name, value in super().state_dict().items() if name != "total_steps"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state but keep the length of this run."""
        super().load_state_dict({**state_dict, "total_steps": self.total_steps})

    def get_lr(self) -> list[float]:  # type: ignore[override]
        """Return the rate of each group for the next optimizer step."""
        return [float(base) * self.factor(self.last_epoch) for base in self.base_lrs]


class CosineWithWarmup(RunSchedule):
    """Linear warm-up, then a cosine from the base rate to ``final_ratio`` times the base rate.

    Args:
        optimizer: The ``lr`` of its groups are the base rates.
        warmup_steps: Steps of the linear warm-up; 0 starts at the full rate.
        final_ratio: Rate at the end divided by the base rate (arXiv:2506.08001 uses 0.01).
        total_steps: Length in optimizer steps; None for the length that the trainer computes.

    Raises:
        ConfigurationError: If a number is out of its range.
    """

    def __init__(
        self, optimizer: Optimizer, warmup_steps: int = 0, final_ratio: float = 0.01, total_steps: int | None = None
    ) -> None:
        super().__init__(optimizer, warmup_steps, final_ratio, total_steps)

    def after_warmup(self, progress: float) -> float:
        """Return the value of the cosine."""
        return self.final_ratio + (1 - self.final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


class WarmupStableDecay(RunSchedule):
    """Linear warm-up, a constant rate, and a linear decay to ``final_ratio`` times the base rate at the end of the run.

    Source: MiniCPM (arXiv:2404.06395, section 4). The length of a run need not be known before the decay: a checkpoint
    of the constant part can be resumed with any larger ``max_steps``.

    Args:
        optimizer: The ``lr`` of its groups are the base rates.
        warmup_steps: Steps of the linear warm-up; 0 starts at the full rate.
        decay_fraction: Fraction of the steps after the warm-up in which the rate decays, in (0, 1].
        final_ratio: Rate at the end divided by the base rate.
        total_steps: Length in optimizer steps; None for the length that the trainer computes.

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
            raise ConfigurationError(f"decay_fraction={decay_fraction}: take a fraction of the run above 0 and up to 1")
        self.decay_fraction = decay_fraction
        super().__init__(optimizer, warmup_steps, final_ratio, total_steps)

    def after_warmup(self, progress: float) -> float:
        """Return 1, then the linear decay to ``final_ratio``."""
        fallen = max(0.0, (progress - (1 - self.decay_fraction)) / self.decay_fraction)
        return 1 - (1 - self.final_ratio) * fallen
