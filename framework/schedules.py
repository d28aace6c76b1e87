"""Learning-rate schedules that learn the length of the run from the trainer."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from orthotrain.errors import ConfigurationError


class CosineWithWarmup(LRScheduler):
    """Linear warm-up, then a cosine from the base rate to ``final_ratio`` of it at ``total_steps``.

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
        if warmup_steps < 0 or not 0 <= final_ratio <= 1:
            raise ConfigurationError(
                f"warmup_steps={warmup_steps}, final_ratio={final_ratio}: the first must be 0 or more, "
                "the second from 0 to 1"
            )
        self.warmup_steps = warmup_steps
        self.final_ratio = final_ratio
        self.total_steps = total_steps
        super().__init__(optimizer)

    def factor(self, step: int) -> float:
        """Return the rate at ``step`` (from 0) over the base rate."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.total_steps is None:
            return 1.0
        span = max(1, self.total_steps - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / span)
        return self.final_ratio + (1 - self.final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))

    def get_lr(self) -> list[float]:  # type: ignore[override]
        """Return the rate of each group for the next optimizer step."""
        return [float(base) * self.factor(self.last_epoch) for base in self.base_lrs]
