"""Merge-then-reinitialize: fold the rotations into the frozen weights every N optimizer steps."""

from collections.abc import Iterable
from typing import Any

import lightning as L
from lightning.pytorch.strategies import DeepSpeedStrategy

from orthotrain.callbacks.step_callback import StepCallback
from orthotrain.checkpoints.stored_values import stored_count
from orthotrain.devices.host_reads import host_number, read_waits
from orthotrain.errors import ConfigurationError, check_count
from orthotrain.layers.finite_checks import FiniteChecks
from orthotrain.layers.folding import NormWatch, fold_rotations, merge_rotations
from orthotrain.layers.protocols import Counting, Foldable, Mergeable, Stepwise, mergeable_layers


class MergeRotations(StepCallback):
    """Merge every :class:`Mergeable` layer each ``every_n_steps`` optimizer steps (arXiv:2506.08001, section 3.3).

    A merge folds the rotations into the weights, sets the generators to zero, draws the next permutations and drops the
    optimizer's state of the generators, whose coordinates have changed their meaning. It changes no output beyond
    rounding. Every rank merges for itself and reaches the same bits: nothing is communicated. ``merges`` is logged.

    A series like Cayley-Neumann is orthogonal only near zero. With ``max_generator_norm`` a layer is also folded as
    soon as one of its blocks exceeds that norm, alone and without waiting for the period. A fold keeps permutations and
    optimizer state: the tangent space has turned by a small rotation, the moments still point the right way, and a run
    that dropped them at each fold would never leave the first steps of Adam. ``early_folds``, the number of single
    layers folded so far, is logged. On a CPU the norm is read at once. On any other device the host would wait for the
    norm at every step; there it is read, and the layer folded, one step later.

    Layers that fold every step (:class:`Stepwise`) take an ``every_n_steps`` of 1. They are only folded until
    ``resample_every`` steps have passed, and then merged.

    Args:
        every_n_steps: Optimizer steps between merges, T_m; at least 1.
        max_generator_norm: Largest ``||Q||_2`` of a block that waits for the next period, None for no bound; 0.3 keeps
            ``R^T R`` of Cayley-Neumann's order 4 within 6e-6 of I. Measured after every optimizer step, by an upper
            bound (:func:`spectral_bound`).
        resample_every: Optimizer steps between new permutations, a multiple of ``every_n_steps``; None for new
            permutations in every period.

    Attributes:
        merges: How often the whole model was merged.
        early_folds: How many single layers were folded before their period ended.
        last_merge: Optimizer step after which the whole model was merged last, None before the first time.

    Raises:
        ConfigurationError: If ``every_n_steps`` is below 1, ``max_generator_norm`` not positive or ``resample_every``
            not a multiple. When fitting starts: if the model has no layer to merge, if a layer cannot keep its
            permutations as ``resample_every`` asks, if a layer that folds every step has another period or a weight
            that is stored too coarsely, if a layer cannot be folded as ``max_generator_norm`` asks, or if another
            callback merges too.
    """

    def __init__(
        self, every_n_steps: int = 400, max_generator_norm: float | None = None, resample_every: int | None = None
    ) -> None:
        check_count("every_n_steps", every_n_steps)
        if max_generator_norm is not None and not max_generator_norm > 0:
            raise ConfigurationError(f"max_generator_norm={max_generator_norm!r}: take a positive norm, or null")
        if resample_every is not None and (resample_every < 1 or resample_every % every_n_steps):
            raise ConfigurationError(
                f"resample_every={resample_every!r}: take a multiple of every_n_steps={every_n_steps}, 1 or more"
            )
        self.every_n_steps = every_n_steps
        self.max_generator_norm = max_generator_norm
        self.resample_every = resample_every or every_n_steps
        self.merges = self.early_folds = 0
        self.last_merge: int | None = None
        self._decision = 0, False  # a step, and whether a period ends with it
        self._layers: dict[str, Mergeable] = {}
        self._watch = NormWatch(max_generator_norm or 0.0)
        self._checks = FiniteChecks()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Count from zero; a resumed run restores its counters after this."""
        self.merges = self.early_folds = 0
        self.last_merge = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the layers to merge; refuse a model without any, or with a layer that these settings would spoil."""
        layers = self._layers = dict(mergeable_layers(pl_module))
        if not layers:
            raise ConfigurationError(
                "MergeRotations found no layer to merge: wrap the model with replace_linears first"
            )
        if sum(isinstance(callback, MergeRotations) for callback in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise ConfigurationError(
                "two callbacks that both fold the rotations of this model: keep one MergeRotations"
            )
        for name, layer in layers.items():
            self._check_layer(f"{name} ({type(layer).__name__})", name, layer)

    def _check_layer(self, described: str, name: str, layer: Mergeable) -> None:
        if self.max_generator_norm is not None and not isinstance(layer, Foldable):
            raise ConfigurationError(
                f"max_generator_norm={self.max_generator_norm}: {described} cannot be folded between two merges; set "
                "it to null"
            )
        if isinstance(layer, Stepwise):
            if self.every_n_steps != 1:
                raise ConfigurationError(
                    f"every_n_steps={self.every_n_steps}: {described} computes without its rotations and must fold "
                    "every step: set every_n_steps, or merge_every of the module, to 1"
                )
            layer.check_storage(name)
        elif self.resample_every != self.every_n_steps:
            raise ConfigurationError(
                f"resample_every={self.resample_every}: {described} draws new permutations at each merge; only layers "
                "that fold every step keep their permutations"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read the layers' counters, and measure the generators, which a checkpoint may have brought."""
        for layer in self._layers.values():
            if isinstance(layer, Counting):
                layer.read_counts()
        if self.max_generator_norm is not None and read_waits(pl_module.device):
            self._watch.measure(self._layers)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Release the layers."""
        self._layers = {}
        self._checks = FiniteChecks()
        self._watch.forget()

    def on_step_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Merge or fold at the end of a period, and fold layers that have exceeded the norm between two periods."""
        step = trainer.global_step
        self._checks.raise_errors()  # of the weights that the step before has folded
        if self._ends_period(step):
            self._watch.forget()
            if step % self.resample_every:
                self._checks = fold_rotations(self._layers)  # type: ignore[arg-type]
                return
            self._checks = merge_rotations(self._layers, trainer.optimizers)
            self.merges += 1
            self.last_merge = step
            pl_module.log("merges", host_number(self.merges), rank_zero_only=True)
        elif self.max_generator_norm is not None:
            far = self._watch.beyond(self._layers)
            self._checks = fold_rotations(far)  # type: ignore[arg-type]
            self.early_folds += len(far)
            pl_module.log("early_folds", host_number(self.early_folds), rank_zero_only=True)
            if read_waits(pl_module.device):
                self._watch.measure(self._layers)

    def on_save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Check the weights that the last step has folded, before they are written and when training ends.

        Raises:
            TrainingDiverged: If a weight was not finite, naming its layer. The layer has kept its old weight.
        """
        self._checks.raise_errors()

    on_train_end = on_save_checkpoint

    def should_merge(self, step: int) -> bool:
        """Decide whether a period ends with optimizer step ``step`` (counted from 1); override for other periods."""
        return step % self.every_n_steps == 0

    def needs_finite(self, step: int) -> bool:
        """Tell whether the generators must be finite after this step, or were not finite in the step before.

        Layers that fold every step check their generators themselves, and report the result one step later.
        """
        if self._checks.failures():
            return True
        return any(not isinstance(layer, Stepwise) for layer in self._layers.values()) and self._ends_period(step)

    def _ends_period(self, step: int) -> bool:
        """Ask :meth:`should_merge` once for each step: a subclass may count its calls."""
        if self._decision[0] != step:
            self._decision = step, self.should_merge(step)
        return self._decision[1]

    def state_dict(self) -> dict[str, Any]:
        """Save the counters as plain values."""
        return {"merges": self.merges, "early_folds": self.early_folds, "last_merge": self.last_merge}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the counters."""
        self.merges, self.early_folds = (stored_count(state_dict, name) for name in ("merges", "early_folds"))
        self.last_merge = stored_count(state_dict, "last_merge", optional=True)


def merging_of(trainer: L.Trainer) -> MergeRotations | None:
    """Return the callback of a trainer that merges, None if there is none."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, MergeRotations)), None)


def check_merging(strategy: object, callbacks: Iterable[object]) -> None:
    """Refuse a strategy under which a merge would be lost.

    Args:
        strategy: The trainer's strategy.
        callbacks: The trainer's callbacks, with those of the module.

    Raises:
        ConfigurationError: If rotations are merged under DeepSpeed.
    """
    if isinstance(strategy, DeepSpeedStrategy) and any(isinstance(c, MergeRotations) for c in callbacks):
        raise ConfigurationError(
            "DeepSpeed keeps copies of the trained parameters in fp32, which a merge does not reach: the rotations "
            "would come back in the next step; take -c trainer/fsdp2.yaml or -c trainer/ddp.yaml"
        )
