"""Callbacks that a module attaches to the trainer, in addition to those that the user has given."""

from collections.abc import Iterable, Sequence

import lightning as L

from orthotrain.callbacks.merge_rotations import MergeRotations
from orthotrain.errors import ConfigurationError

_MARK = "attached_by_module"


def given_callbacks(trainer: L.Trainer | None) -> list[L.Callback]:
    """Return the callbacks that the user has given to a trainer, without those that a module has attached."""
    callbacks = [] if trainer is None else trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if not hasattr(callback, _MARK)]


def unless_given(trainer: L.Trainer | None, callbacks: Sequence[L.Callback]) -> list[L.Callback]:
    """Return the callbacks that a module attaches: of each class of which the user has given no callback.

    Lightning would replace the user's callback by that of the module without a message.

    Args:
        trainer: The trainer, None if the module has none yet.
        callbacks: The callbacks that the module wants.
    """
    given = given_callbacks(trainer)
    return marked(c for c in callbacks if not any(isinstance(other, type(c)) for other in given))


def marked(callbacks: Iterable[L.Callback]) -> list[L.Callback]:
    """Mark callbacks as attached by a module, so that the next run of the trainer does not take them as the user's."""
    found = list(callbacks)
    for callback in found:
        setattr(callback, _MARK, True)
    return found


def sole_merging(trainer: L.Trainer | None, own: MergeRotations) -> list[L.Callback]:
    """Return the callback that merges for a module, to be attached to the trainer.

    Raises:
        ConfigurationError: If the user has given the trainer another callback that merges.
    """
    for other in given_callbacks(trainer):
        if isinstance(other, MergeRotations) and other is not own:
            raise ConfigurationError(
                f"trainer.callbacks has {type(other).__name__}(every_n_steps={other.every_n_steps}) beside the "
                f"module's MergeRotations(every_n_steps={own.every_n_steps}), two callbacks that both fold: remove it, "
                "and set merge_every and resample_every of the module"
            )
    return marked([own])
