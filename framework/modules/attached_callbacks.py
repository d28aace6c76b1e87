"""Callbacks that a module attaches, in addition to those that the user has given to the trainer."""

from collections.abc import Iterable, Sequence

import lightning as L
from lightning.pytorch.utilities.enums import GradClipAlgorithmType
from torch.optim import Optimizer

from orthotrain.callbacks.merge_rotations import MergeRotations, merging_of
from orthotrain.errors import ConfigurationError
from orthotrain.modules.optimization import ClipRamp

_MARK = "attached_by_module"


def given_callbacks(trainer: L.Trainer | None) -> list[L.Callback]:
    """Return the callbacks that the user gave to a trainer, without those that a module has attached."""
    callbacks = [] if trainer is None else trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if not hasattr(callback, _MARK)]


def unless_given(trainer: L.Trainer | None, callbacks: Sequence[L.Callback]) -> list[L.Callback]:
    """Return the callbacks of a module, without those of a class that the user has given to the trainer.

    Lightning would silently replace the user's callback by the module's.

    Args:
        trainer: The trainer, None where the module has none yet.
        callbacks: The callbacks that the module attaches.
    """
    given = given_callbacks(trainer)
    return marked(c for c in callbacks if not any(isinstance(other, type(c)) for other in given))


def marked(callbacks: Iterable[L.Callback]) -> list[L.Callback]:
    """Mark callbacks as attached by a module, so that the trainer's next run does not take them for the user's."""
    attached = list(callbacks)
    for callback in attached:
        setattr(callback, _MARK, True)
    return attached


def sole_merging(trainer: L.Trainer | None, own: MergeRotations) -> list[L.Callback]:
    """Return the merging callback of a module, for the trainer to attach.

    Raises:
        ConfigurationError: If the user has given the trainer another one.
    """
    for other in given_callbacks(trainer):
        if isinstance(other, MergeRotations) and other is not own:
            raise ConfigurationError(
                f"trainer.callbacks has {type(other).__name__}(every_n_steps={other.every_n_steps}) beside the "
                f"module's MergeRotations(every_n_steps={own.every_n_steps}), and both would fold: leave it "
                "out and set merge_every and resample_every of the module"
            )
    return marked([own])


def clip_after_merges(
    trainer: L.Trainer, optimizer: Optimizer, ramp: ClipRamp, value: float | None, algorithm: str | None
) -> None:
    """Clip gradients as the trainer does, more tightly after a merge.

    Args:
        trainer: The trainer.
        optimizer: The optimizer of the gradients.
        ramp: The ramp after a merge.
        value: The trainer's ``gradient_clip_val``.
        algorithm: The trainer's ``gradient_clip_algorithm``.

    Raises:
        ConfigurationError: If there is no bound that the ramp could scale, or no callback that merges.
    """
    merging = merging_of(trainer)
    if merging is None:
        raise ConfigurationError("clip_ramp follows merges, and nothing merges in this run: leave the ramp out")
    if value is None:
        raise ConfigurationError("clip_ramp scales trainer.gradient_clip_val: set it, or leave the ramp out")
    bound = value * ramp.factor(trainer.global_step, merging.last_merge)
    # LightningModule.clip_gradients refuses every bound but the trainer's own
    trainer.precision_plugin.clip_gradients(optimizer, bound, GradClipAlgorithmType(algorithm or "norm"))
