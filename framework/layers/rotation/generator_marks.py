"""Marks on parameters: which ones are generators, and which generators are known to be zero."""

from torch import Tensor

_MARK = "rotated_share"


def mark_generators(parameter: Tensor, share: float) -> None:
    """Mark a parameter as generators, which may have any value: they are new, or loaded.

    The mark is an attribute of the tensor, because FSDP and ``torch.compile`` would not keep a subclass of
    ``nn.Parameter``. A copy of the parameter has no mark and must be marked again.

    Args:
        parameter: ``(n, b(b-1)/2)``.
        share: Share of the features that lie in a block, in (0, 1].
    """
    setattr(parameter, _MARK, share)
    parameter.zero_at, parameter.rests = None, False  # type: ignore[attr-defined]


def rotated_share(parameter: Tensor) -> float | None:
    """Return the share of the features that generators rotate, None for a parameter that is not generators."""
    return getattr(parameter, _MARK, None)


def mark_zero(parameter: Tensor) -> None:
    """Note that generators have just been set to zero."""
    parameter.zero_at = None if parameter.is_inference() else parameter._version  # type: ignore[attr-defined]
    parameter.rests = False  # type: ignore[attr-defined]


def mark_resting(parameter: Tensor) -> None:
    """Note that the optimizer does not change generators in this step."""
    parameter.rests = True  # type: ignore[attr-defined]


def known_zero(parameter: Tensor) -> bool:
    """Tell whether generators are known to be zero without reading their values.

    The optimizer must have marked them as resting, because an optimizer that writes through a pointer does not change
    the tensor's version. And the version must be the one at which they were set to zero.
    """
    zero_at = getattr(parameter, "zero_at", None)
    return zero_at is not None and getattr(parameter, "rests", False) and zero_at == parameter._version
