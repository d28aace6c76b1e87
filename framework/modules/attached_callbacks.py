"""Callbacks that a module attaches, beside those that the user has given to the trainer."""

from collections.abc import Iterable, Sequence

import lightning as L

from orthotrain.callbacks.merge_rotations import MergeRotations
from orthotrain.errors import ConfigurationError

_MARK = "attached_by_module"


def given_callbacks(trainer: L.Trainer | None) -> list[L.Callback]:
    """Return the callbacks that the user gave to a trainer: all but those that a module has attached."""
    callbacks = [] if trainer is None else trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if not hasattr(callback, _MARK)]


def unless_given(trainer: L.Trainer | None, callbacks: Sequence[L.Callback]) -> list[L.Callback]:
    """Return the callbacks that a module is to attach: those of whose kind the user has given none.

    Lightning would replace the user's by the module's without a word.

    Args:
        trainer: The trainer, None where the module has none yet.
        callbacks: What the module wants.
    """
    given = given_callbacks(trainer)
    return marked(c for c in callbacks if not any(isinstance(other, type(c)) for other in given))


def marked(callbacks: Iterable[L.Callback]) -> list[L.Callback]:
    """Note in callbacks that a module has attached them: in the next run of the trainer they are not the user's."""
    found = list(callbacks)
    for callback in found:
        setattr(callback, _MARK, True)
    return found


def sole_merging(trainer: L.Trainer | None, own: MergeRotations) -> list[L.Callback]:
    """Return the callback with which a module merges, for the trainer to attach.

    Raises:
        ConfigurationError: If the user has given the trainer one too.
    """
    for other in given_callbacks(trainer):
        if isinstance(other, MergeRotations) and other is not own:
            raise ConfigurationError(
                f"trainer.callbacks has {type(other).__name__}(every_n_steps={other.every_n_steps}) beside the "
                f"module's MergeRotations(every_n_steps={own.every_n_steps}), two callbacks that both fold: leave it "
                "out and set merge_every and resample_every of the module"
            )
    return marked([own])
