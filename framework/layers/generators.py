"""The mark that tells generators from every other parameter."""

from torch import Tensor

_MARK = "rotated_share"


def mark_generators(parameter: Tensor, share: float) -> None:
    """Mark a parameter as generators.

    An attribute of the tensor and not a subclass of ``nn.Parameter``, which FSDP and ``torch.compile`` would not keep.
    A copy of the parameter has lost it: whoever makes one marks it again.

    Args:
        parameter: ``(n, b(b-1)/2)``.
        share: Part of the coordinates of its axis that lie in a block, in (0, 1].
    """
    setattr(parameter, _MARK, share)


def rotated_share(parameter: Tensor) -> float | None:
    """Return the part of the coordinates that generators rotate, None for a parameter that is not generators."""
    return getattr(parameter, _MARK, None)
