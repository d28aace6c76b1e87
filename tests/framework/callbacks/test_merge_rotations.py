"""MergeRotations in a real Trainer: optimizer steps, accumulation, optimizer state, and no jump in the function."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from orthotrain.callbacks import MergeRotations
from orthotrain.errors import ConfigurationError, TrainingDiverged
from orthotrain.layers import mergeable_layers
from orthotrain.layers.folding import NormWatch, fold_rotations, merge_rotations
from orthotrain.layers.spectrum import spectra, spectrum_drift
from orthotrain.modules import LoraLayers, Optimization, PoetLayers, PoetModule
from orthotrain.plugins import CayleyNeumann


class Regression(PoetModule):
    """A network that is no language model."""

    def loss(self, batch):
        return F.mse_loss(self(batch), batch.flip(-1))


def network():
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))


def fit(merge_every, steps, accumulate=1, max_generator_norm=None, lr=1e-2, order=4):
    module = Regression(
        network(),
        PoetLayers(block_size=4, init="keep", parameterization=CayleyNeumann(order)),
        merge_every=merge_every,
        max_generator_norm=max_generator_norm,
        optimization=Optimization(lr=lr),
    )
    trainer = L.Trainer(
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(torch.randn(64, 8), batch_size=4))
    return module, trainer


@pytest.mark.parametrize("accumulate", [1, 3])
def test_counts_optimizer_steps_not_micro_batches(accumulate):
    module, trainer = fit(merge_every=2, steps=5, accumulate=accumulate)
    assert trainer.global_step == 5
    assert [int(layer.merge_count) for _, layer in mergeable_layers(module)] == [2, 2]
    callback = next(c for c in trainer.callbacks if isinstance(c, MergeRotations))
    assert callback.merges == 2


@pytest.mark.parametrize("kwargs", [{}, {"fused": True}, {"foreach": True}, {"amsgrad": True}])
def test_resets_the_generators_optimizer_state_and_nothing_else(kwargs):
    model = network()
    PoetLayers(block_size=4).apply_(model)
    optimization = Optimization(optimizer=lambda groups: torch.optim.AdamW(groups, **kwargs))
    optimizer = optimization.configure(model, 10)["optimizer"]
    rotations = {p for _, layer in mergeable_layers(model) for p in layer.rotation_parameters()}
    for _ in range(2):
        model(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
    assert rotations <= set(optimizer.state)
    biases = {p: optimizer.state[p]["exp_avg"].clone() for p in optimizer.state if p not in rotations}
    merge_rotations(dict(mergeable_layers(model)), [optimizer])
    assert not rotations & set(optimizer.state)
    assert biases and all(torch.equal(optimizer.state[p]["exp_avg"], m) for p, m in biases.items())
    model(torch.randn(4, 8)).square().sum().backward()
    optimizer.step()
    assert all(float(optimizer.state[p]["step"]) == 1 for p in rotations)


def test_a_merge_changes_no_output():
    model = network()
    PoetLayers(block_size=4, init="keep").apply_(model)
    with torch.no_grad():
        for _, layer in mergeable_layers(model):
            for generators in layer.rotation_parameters():
                generators.normal_(0, 0.1)
    x = torch.randn(32, 8)
    before = model(x)
    merge_rotations(dict(mergeable_layers(model)), [])
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)


def test_a_poet_run_cannot_forget_to_merge():
    _, trainer = fit(merge_every=3, steps=1)
    assert [c.every_n_steps for c in trainer.callbacks if isinstance(c, MergeRotations)] == [3]


def test_a_model_without_rotations_is_refused():
    class Plain(L.LightningModule):
        def configure_optimizers(self):
            return None

    with pytest.raises(ConfigurationError, match="found no layer to merge"):
        MergeRotations().on_fit_start(None, Plain())


@pytest.mark.parametrize("value", [0, -1, 2.5, True])
def test_a_period_below_one_is_refused(value):
    with pytest.raises(ConfigurationError, match=f"merge_every={value}"):
        PoetModule(network(), merge_every=value)


def test_folds_a_layer_early_when_its_generators_go_too_far():
    model = network()
    PoetLayers(block_size=4).apply_(model)
    with torch.no_grad():
        model[2].rotation_in.generators[0, 0] = 0.5
        model[0].rotation_in.generators[0, 0] = 0.2
    assert list(NormWatch(0.3).beyond(dict(mergeable_layers(model)))) == ["2"]
    module, trainer = fit(merge_every=1000, steps=8, max_generator_norm=0.03)
    callback = next(c for c in trainer.callbacks if isinstance(c, MergeRotations))
    layers = [layer for _, layer in mergeable_layers(module)]
    assert callback.merges == 0 and not any(layer.merge_count for layer in layers)
    assert callback.early_folds == sum(int(layer.fold_count) for layer in layers) > 0
    assert not NormWatch(0.03).beyond(dict(mergeable_layers(module)))


def test_the_bound_keeps_a_series_orthogonal_where_it_would_diverge():
    def worst(bound):
        """Largest deviation of the spectrum after steps that are too large for the series."""
        torch.manual_seed(0)
        module, _ = fit(merge_every=1000, steps=30, max_generator_norm=bound, lr=0.05, order=2)
        start = torch.linalg.svdvals(network_weight(0))
        return float((torch.linalg.svdvals(module.model[0].merged_weight()) - start).abs().max() / start.max())

    assert worst(None) > 0.01
    assert worst(0.06) < 1e-3


def test_an_early_fold_keeps_permutation_and_optimizer_state():
    module, trainer = fit(merge_every=1000, steps=8, max_generator_norm=0.03)
    fresh, _ = fit(merge_every=1000, steps=8)
    for (_, layer), (_, other) in zip(mergeable_layers(module), mergeable_layers(fresh), strict=True):
        assert int(layer.fold_count) > 0
        for (_, mine), (_, theirs) in zip(layer.sides(), other.sides(), strict=True):
            assert torch.equal(mine.permutation, theirs.permutation)
        for parameter in layer.rotation_parameters():
            assert float(trainer.optimizers[0].state[parameter]["step"]) == 8


def test_a_bound_that_is_never_reached_changes_no_bit():
    runs = []
    for bound in (None, 10.0):
        torch.manual_seed(0)
        runs.append(fit(merge_every=3, steps=8, max_generator_norm=bound)[0].state_dict())
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


class Student(PoetModule):
    """Fits a teacher and records its losses."""

    def loss(self, batch):
        loss = (self(batch[0]) - batch[1]).square().mean()
        self.losses.append(float(loss))
        return loss


def learn(bound, rotation_lr):
    """Return first and last losses and the spectrum drift of a run with long periods and a series of order 4."""
    torch.manual_seed(0)
    hidden = [layer for _ in range(3) for layer in (nn.Linear(24, 24), nn.ReLU())]
    student, teacher = nn.Sequential(*hidden, nn.Linear(24, 8)), nn.Sequential(nn.Linear(24, 32), nn.Tanh())
    x = torch.randn(512, 24)
    y = 3 * nn.Linear(32, 8)(teacher(x)).detach()
    rates = Optimization(lr=1e-3, rotation_lr=rotation_lr)
    module = Student(student, PoetLayers(block_size=8), 1000, max_generator_norm=bound, optimization=rates)
    module.losses = []
    module.configure_model()
    start = spectra(module, [name for name, _ in mergeable_layers(module)])
    rows = DataLoader(list(zip(x, y, strict=True)), batch_size=32, shuffle=True)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    L.Trainer(max_steps=400, accelerator="cpu", enable_model_summary=False, **quiet).fit(module, rows)
    return sum(module.losses[:10]) / 10, sum(module.losses[-30:]) / 30, spectrum_drift(module, start)


def test_the_bound_keeps_the_spectrum_of_a_run_with_too_large_a_rate_and_lets_it_learn():
    *_, unguarded_drift = learn(None, 0.025)
    first, last, drift = learn(0.3, 0.025)
    assert unguarded_drift > 0.05 > 1e-4 > drift
    assert last < first / 4


def test_a_layer_that_cannot_fold_between_merges_refuses_the_bound():
    model = network()
    LoraLayers(rank=2).apply_(model)
    module = Regression(model, PoetLayers(include=["9"]))
    trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    with pytest.raises(ConfigurationError, match=r"max_generator_norm=0.3: model.0 \(LoraLinear\) cannot be folded"):
        MergeRotations(10, max_generator_norm=0.3).on_fit_start(trainer, module)


@pytest.mark.parametrize("storage", ["dense", "int8", "nf4"])
@pytest.mark.parametrize("how", [merge_rotations, lambda layers, _: fold_rotations(layers)])
def test_a_weight_that_is_not_finite_is_not_stored(how, storage):
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 64))
    PoetLayers(block_size=4, exclude=[], storage=storage).apply_(model)
    with torch.no_grad():
        model[1].rotation_in.generators[0, 0] = torch.nan
    before = {name: tensor.clone() for name, tensor in model[1].state_dict().items()}
    with pytest.raises(TrainingDiverged, match=r"^1: the rotations of a weight \(64 x 32\) hold NaN, infinite or huge"):
        how(dict(mergeable_layers(model)), [])
    for name, tensor in model[1].state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)


def network_weight(index):
    torch.manual_seed(0)
    return network()[index].weight.detach()


@pytest.mark.parametrize("value", [0, -1.0, float("nan")])
def test_a_bound_that_is_not_positive_is_refused(value):
    with pytest.raises(ConfigurationError, match=f"max_generator_norm={value}"):
        PoetModule(network(), max_generator_norm=value)


def test_periods_with_a_state_are_asked_for_once_a_step():
    class EverySecond(MergeRotations):
        asked = 0

        def should_merge(self, step):
            self.asked += 1
            return self.asked % 2 == 0

    merging = EverySecond()
    answers = [(merging._ends_period(step), merging._ends_period(step)) for step in range(1, 5)]
    assert answers == [(False, False), (True, True)] * 2 and merging.asked == 4
