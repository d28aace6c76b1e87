"""Merge-then-reinitialise: fold the rotations into the frozen weights every N optimizer steps."""

from collections.abc import Iterable
from typing import Any

import lightning as L
from lightning.pytorch.strategies import DeepSpeedStrategy

from orthotrain.checkpoints.stored_values import stored_count
from orthotrain.devices.host_reads import host_number, read_waits
from orthotrain.errors import ConfigurationError
from orthotrain.layers.finite import FiniteChecks
from orthotrain.layers.folding import NormWatch, fold_rotations, merge_rotations
from orthotrain.layers.mergeable import Counting, Foldable, Mergeable, Stepwise, mergeable_layers


class MergeRotations(L.Callback):
    """Fold every :class:`Mergeable` layer each ``every_n_steps`` optimizer steps (arXiv:2506.08001, section 3.3).

    Counted are optimizer steps, not micro-batches. A merge changes no output beyond rounding; it resets the generators
    to zero, draws the next permutations and forgets the optimizer's state of the generators, whose coordinates have
    changed their meaning. Every rank folds for itself and reaches the same bits: nothing is communicated.

    A series like Cayley-Neumann is orthogonal only near zero: with ``max_generator_norm`` a layer is also folded as
    soon as one of its blocks goes farther, alone and without waiting for the period. Permutations and optimizer state
    stay until the period ends: where the tangent space has turned by a small rotation, the moments still point the
    right way, and a run that dropped them each time would not leave the first steps of Adam. Logged are ``merges`` of
    the whole model and ``early_merges`` of single layers. The bound is read at once on a CPU. On any other device the
    host would wait for it at every step: there it is read, and the layer folded, one step later.

    Layers that fold every step (:class:`Stepwise`) take an ``every_n_steps`` of 1; they keep their permutations, and
    the optimizer its state, until ``resample_every`` steps have passed.

    Args:
        every_n_steps: Optimizer steps between merges, T_m; at least 1.
        max_generator_norm: Largest ``||Q||_2`` of a block that waits for the next period, None for no bound; 0.3 keeps
            ``R^T R`` of Cayley-Neumann's order 4 within 6e-6 of I. Measured after every optimizer step, by an upper
            bound (:func:`spectral_bound`).
        resample_every: Optimizer steps between new permutations, a multiple of ``every_n_steps``; None for at each
            merge.

    Attributes:
        last_merge: Optimizer step after which the whole model was merged last, None before the first time.

    Raises:
        ConfigurationError: If ``every_n_steps`` is below 1, ``max_generator_norm`` not positive or ``resample_every``
            no multiple; when fitting starts, if the model has no layer to merge, one that cannot keep its permutations,
            one that folds every step with another period or a weight that is too coarse for it, one that
            ``max_generator_norm`` could not fold, or another callback merges too.
    """

    def __init__(
        self, every_n_steps: int = 400, max_generator_norm: float | None = None, resample_every: int | None = None
    ) -> None:
        check_period("every_n_steps", every_n_steps)
        if max_generator_norm is not None and not max_generator_norm > 0:
            raise ConfigurationError(f"max_generator_norm={max_generator_norm!r}: take a positive norm, or null")
        if resample_every is not None and (resample_every < 1 or resample_every % every_n_steps):
            raise ConfigurationError(
                f"resample_every={resample_every!r}: take a multiple of every_n_steps={every_n_steps}, 1 or more"
            )
        self.every_n_steps = every_n_steps
        self.max_generator_norm = max_generator_norm
        self.resample_every = resample_every or every_n_steps
        self.merges = self.early_merges = 0
        self.last_merge: int | None = None
        self._last_step = 0
        self._asked = 0, False
        self._layers: dict[str, Mergeable] = {}
        self._watch = NormWatch(max_generator_norm or 0.0)
        self._checks = FiniteChecks()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Count from zero; a resumed run restores its counters after this."""
        self.merges = self.early_merges = self._last_step = 0
        self.last_merge = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the layers to merge; refuse a model without any, or with some that this callback would spoil."""
        layers = self._layers = dict(mergeable_layers(pl_module))
        if not layers:
            raise ConfigurationError(
                "MergeRotations found no layer to merge: wrap the model with replace_linears first"
            )
        if sum(isinstance(callback, MergeRotations) for callback in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise ConfigurationError(
                "two callbacks that both fold the rotations of this model: keep one MergeRotations"
            )
        self._check_stepwise({name: layer for name, layer in layers.items() if isinstance(layer, Stepwise)})
        rigid = [name for name, layer in layers.items() if not isinstance(layer, Foldable)]
        if rigid and self.max_generator_norm is not None:
            raise ConfigurationError(
                f"max_generator_norm={self.max_generator_norm}: {rigid[0]} ({type(layers[rigid[0]]).__name__}) cannot "
                "be folded between two merges; set it to null"
            )
        fixed = [name for name, layer in layers.items() if not isinstance(layer, Stepwise)]
        if fixed and self.resample_every != self.every_n_steps:
            raise ConfigurationError(
                f"resample_every={self.resample_every}: {fixed[0]} ({type(layers[fixed[0]]).__name__}) draws new "
                "permutations at each merge; only layers that fold every step keep theirs"
            )

    def _check_stepwise(self, layers: dict[str, Stepwise]) -> None:
        for name, layer in layers.items():
            if self.every_n_steps != 1:
                raise ConfigurationError(
                    f"every_n_steps={self.every_n_steps}: {name} ({type(layer).__name__}) computes without its "
                    "rotations and must fold every step: set every_n_steps, or merge_every of the module, to 1"
                )
            layer.check_storage(name)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read what a checkpoint has brought: the counts of the layers, and how far its generators have gone."""
        for layer in self._layers.values():
            if isinstance(layer, Counting):
                layer.read_counts()
        if self.max_generator_norm is not None and read_waits(pl_module.device):
            self._watch.measure(self._layers)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let go of the layers."""
        self._layers = {}
        self._checks = FiniteChecks()
        self._watch.forget()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Merge when an optimizer step that ends a period has just been taken."""
        step = trainer.global_step
        if step == self._last_step:
            return
        self._last_step = step
        self._checks.raise_errors()  # at what the step before has folded
        if self._merges_at(step):
            self._watch.forget()
            if step % self.resample_every == 0:
                self._checks = merge_rotations(self._layers, trainer.optimizers)
            else:
                self._checks = fold_rotations(self._layers)  # type: ignore[arg-type]
            self.merges += 1
            self.last_merge = step
            pl_module.log("merges", host_number(self.merges), rank_zero_only=True)
        elif self.max_generator_norm is not None:
            far = self._watch.beyond(self._layers)
            self._checks = fold_rotations(far)  # type: ignore[arg-type]
            self.early_merges += len(far)
            pl_module.log("early_merges", host_number(self.early_merges), rank_zero_only=True)
            if read_waits(pl_module.device):
                self._watch.measure(self._layers)

    def look(self) -> None:
        """Look at the weights that the last step has folded, before a checkpoint is written.

        Raises:
            TrainingDiverged: If a weight was not finite, naming its layer. Its old weight has stayed.
        """
        self._checks.raise_errors()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Look at the weights that the last step has folded."""
        self.look()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look at the weights that the last step has folded."""
        self.look()

    def should_merge(self, step: int) -> bool:
        """Decide whether to merge after optimizer step ``step`` (counted from 1); override for another rhythm."""
        return step % self.every_n_steps == 0

    def needs_finite(self, step: int) -> bool:
        """Tell whether a merge after this step needs finite generators: layers that fold every step see to theirs."""
        fixed = any(not isinstance(layer, Stepwise) for layer in self._layers.values())
        return fixed and self._merges_at(step)

    def _merges_at(self, step: int) -> bool:
        """Ask :meth:`should_merge`, which a subclass may have given a state, once for each step."""
        if self._asked[0] != step:
            self._asked = step, self.should_merge(step)
        return self._asked[1]

    def state_dict(self) -> dict[str, Any]:
        """Save the counters as plain values."""
        return {
            "merges": self.merges,
            "early_merges": self.early_merges,
            "last_merge": self.last_merge,
            "last_step": self._last_step,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the counters, so that a merge at the checkpoint's step is not repeated."""
        self.merges, self.early_merges, self._last_step = (
            stored_count(state_dict, name) for name in ("merges", "early_merges", "last_step")
        )
        self.last_merge = stored_count(state_dict, "last_merge", optional=True)


def check_period(name: str, steps: int) -> None:
    """Refuse a period that is no positive number of optimizer steps.

    Raises:
        ConfigurationError: With the ``name`` that the user knows it by.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ConfigurationError(f"{name}={steps!r}: merge every 1 or more optimizer steps")


def check_merging(strategy: object, callbacks: Iterable[object]) -> None:
    """Refuse a strategy under which a merge would be lost.

    Args:
        strategy: The trainer's.
        callbacks: The trainer's, those of the module among them.

    Raises:
        ConfigurationError: If rotations are merged under DeepSpeed.
    """
    if isinstance(strategy, DeepSpeedStrategy) and any(isinstance(c, MergeRotations) for c in callbacks):
        raise ConfigurationError(
            "DeepSpeed keeps copies of the trained parameters in fp32, which a merge does not reach: the rotations "
            "would come back in the next step; take -c trainer/fsdp2.yaml or -c trainer/ddp.yaml"
        )
