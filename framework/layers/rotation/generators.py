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
    forget_zero(parameter)


def rotated_share(parameter: Tensor) -> float | None:
    """Return the part of the coordinates that generators rotate, None for a parameter that is not generators."""
    return getattr(parameter, _MARK, None)


def mark_zero(parameter: Tensor) -> None:
    """Note that generators have just been set to zero."""
    parameter.zero_at = None if parameter.is_inference() else parameter._version  # type: ignore[attr-defined]
    parameter.rests = False  # type: ignore[attr-defined]


def forget_zero(parameter: Tensor) -> None:
    """Note that nothing is known of generators: they are new, or loaded."""
    parameter.zero_at = None  # type: ignore[attr-defined]
    parameter.rests = False  # type: ignore[attr-defined]


def mark_resting(parameter: Tensor) -> None:
    """Note that the optimizer leaves generators as they are in this step."""
    parameter.rests = True  # type: ignore[attr-defined]


def known_zero(parameter: Tensor) -> bool:
    """Tell whether generators are known to be zero without a look at their values.

    The optimizer must have said so: one that writes through a pointer leaves the count of changes as it is. And nobody
    else may have changed them since they were set to zero.
    """
    zero_at = getattr(parameter, "zero_at", None)
    return zero_at is not None and getattr(parameter, "rests", False) and zero_at == parameter._version
