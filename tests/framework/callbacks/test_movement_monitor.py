"""Movement, angle and cosine of known steps, at every cadence, and across a change of the permutations."""

from functools import partial

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from orthotrain.callbacks import MergeRotations, MovementMonitor
from orthotrain.callbacks.movement_monitor import angle_of
from orthotrain.errors import ConfigurationError
from orthotrain.kernels.skew import skew
from orthotrain.layers import PoetSettings, StepwiseLinear
from orthotrain.modules import Optimization
from orthotrain.optimizers import LieOptimizer


class Driven(L.LightningModule):
    """A layer whose generators get the same gradient in every step, times ``flip`` to the power of its turn."""

    def __init__(self, flip=1, sides="both", **options):
        super().__init__()
        settings = PoetSettings(block_size=8, stepwise=True, parameterization="cayley", sides=sides)
        self.model = nn.Sequential(StepwiseLinear.from_settings(nn.Linear(16, 16), settings, 0))
        self.flip = flip
        self.optimizer = partial(LieOptimizer, **options)
        self.gradients = [torch.randn_like(p) for p in self.model[0].rotation_parameters()]
        self.seen = []

    def training_step(self, batch, batch_idx):
        return self.model(batch).square().mean()

    def on_before_optimizer_step(self, optimizer):
        turn = self.global_step // (2 if len(self.gradients) > 1 else 1)
        for p, gradient in zip(self.model[0].rotation_parameters(), self.gradients, strict=True):
            p.grad = gradient * self.flip**turn

    def configure_optimizers(self):
        return Optimization(rotation_lr=0.02, rotation_optimizer=self.optimizer).configure(self.model, 10)

    def log_dict(self, metrics, **kwargs):
        self.seen.append((self.global_step, metrics))


def fit(module, every, steps=12, resample=100):
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    callbacks = [MovementMonitor(every), MergeRotations(1, resample_every=resample)]
    trainer = L.Trainer(accelerator="cpu", max_steps=steps, enable_checkpointing=False, callbacks=callbacks, **options)
    trainer.fit(module, DataLoader(torch.randn(64, 16), batch_size=4))
    return {step: {name.rpartition("/")[2]: value for name, value in metrics.items()} for step, metrics in module.seen}


@pytest.mark.parametrize("options", [{}, {"alternate": False}, {"sides": "out"}])
@pytest.mark.parametrize("every", [1, 2, 3, 5])
def test_steps_that_repeat_have_a_cosine_of_one(every, options):
    seen = fit(Driven(**options), every)
    assert list(seen) == list(range(every, 13, every))
    first = 3 if not options else 2  # sides that take turns: each moves in every second step
    for step, measured in seen.items():
        if step < first:
            assert "cosine" not in measured
        else:
            assert measured["cosine"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("options", [{}, {"sides": "in"}])
def test_steps_that_turn_back_have_a_cosine_of_minus_one(options):
    seen = fit(Driven(flip=-1, momentum=0.0, **options), 5)
    assert [measured["cosine"] for measured in seen.values()] == pytest.approx([-1, -1], abs=1e-4)


def test_nothing_is_compared_across_a_change_of_the_permutations():
    seen = fit(Driven(alternate=False), 1, resample=4)
    assert [step for step, measured in seen.items() if "cosine" not in measured] == [1, 5, 9]


def test_angle_and_movement_are_those_of_the_step():
    module = Driven(direction="sign")
    seen = fit(module, 1, steps=4)
    for measured in seen.values():
        # signs over sqrt(b - 1): turns of lr in root mean square, on one side
        assert measured["angle"] == pytest.approx(0.02, rel=1e-5)
        assert measured["rms"] == pytest.approx(0.02, rel=0.15)
    generators = [torch.randn(3, 28), torch.randn(2, 10)]
    values = torch.cat([torch.linalg.svdvals(skew(g, b)).flatten() for g, b in zip(generators, (8, 5), strict=True)])
    assert angle_of(generators) == pytest.approx(2 * float(values.square().mean().sqrt()), rel=1e-5)
    assert angle_of([]) == 0


@pytest.mark.parametrize("every", [0, -1, 2.5, True])
def test_a_cadence_below_one_is_refused(every):
    with pytest.raises(ConfigurationError, match=f"every_n_steps={every}: take an integer of at least 1"):
        MovementMonitor(every)
