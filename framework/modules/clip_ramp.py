"""How gradients are clipped while an optimizer that has forgotten its state finds it again."""

from dataclasses import dataclass

from orthotrain.errors import ConfigurationError


@dataclass(frozen=True)
class ClipRamp:
    """Clip gradients harder just after a merge, when the generators' optimizer state is empty.

    The bound rises linearly from ``start`` times the trainer's ``gradient_clip_val`` to all of it (the official POET
    code ramps from 0.1 in 10 steps during early training).

    Layers that are merged early keep that state: no ramp follows.

    Args:
        steps: Optimizer steps of the ramp.
        start: Factor of the bound in the first step after a merge.
        until_step: Optimizer step after which merges are no longer followed by a ramp; None for the whole run.
    """

    steps: int = 10
    start: float = 0.1
    until_step: int | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.start <= 1:
            raise ConfigurationError(
                f"clip_ramp steps={self.steps}, start={self.start}: take 1 or more steps, and a start in (0, 1]"
            )

    def factor(self, step: int, last_merge: int | None) -> float:
        """Return the factor of the bound at optimizer step ``step`` when the last merge came after ``last_merge``."""
        if last_merge is None or (self.until_step is not None and step > self.until_step):
            return 1.0
        return min(1.0, self.start + (1 - self.start) * (step - last_merge) / self.steps)
