"""Callbacks that a module attaches, beside those that the user has given to the trainer."""

from collections.abc import Iterable, Sequence

import lightning as L

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
