"""The spectrum monitor in a real run, and the coverage it reports against a count by hand."""

import csv

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader

from orthotrain.callbacks import SpectrumMonitor
from orthotrain.errors import ConfigurationError
from orthotrain.layers import PoetLinear
from orthotrain.layers.protocols import Covering
from orthotrain.modules import Optimization, PoetLayers, PoetModule


class Poet(PoetModule):
    def loss(self, batch):
        return (self(batch) - batch[:, :8]).square().mean()


def fit(folder, monitor, steps=6, loggers=(), trained_scale=False, **kwargs):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8))
    layers = PoetLayers(block_size=4, exclude=[], trained_scale=trained_scale)
    module = Poet(net, layers, merge_every=2, optimization=Optimization(lr=1e-2))
    rows = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[monitor],
        logger=[CSVLogger(folder, name="", version=""), *loggers],
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **kwargs,
    )
    trainer.fit(module, DataLoader(rows, batch_size=4))
    return module, trainer


def test_logs_and_draws(tmp_path):
    module, trainer = fit(tmp_path, SpectrumMonitor(every_n_steps=2))
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    for layer in ("model.0", "model.2"):
        assert metrics[f"spectrum/{layer}/drift"] < 1e-4
        assert 0.9 < metrics[f"spectrum/{layer}/entropy"] <= 1
        values = torch.linalg.svdvals(dict(module.named_modules())[layer].merged_weight())
        assert metrics[f"spectrum/{layer}/condition"] == pytest.approx(float(values[0] / values[-1]), rel=1e-3)
    drifts = [metrics[f"spectrum/{layer}/drift"] for layer in ("model.0", "model.2")]
    assert metrics["spectrum/drift"] == max(drifts)
    assert not (tmp_path / "spectra.csv").exists()
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0]
    assert "spectrum/model.0/entropy" in header
    for picture in ("spectrum.png", "coverage.png", "orthogonality.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG"), picture


def test_a_trained_scale_is_logged_beside_spectra_without_it(tmp_path):
    monitor = SpectrumMonitor(every_n_steps=3)
    module, trainer = fit(tmp_path, monitor, trained_scale=True)
    for name, layer in monitor.watched(module).items():
        scale = trainer.callback_metrics[f"spectrum/{name}/scale"]
        assert abs(scale - 1) > 1e-2 and scale == pytest.approx(float(layer.scale.log.detach().exp()))
    assert trainer.callback_metrics["spectrum/drift"] < 1e-4


def test_writes_all_values_if_asked_to(tmp_path):
    board = TensorBoardLogger(tmp_path, name="", version="")
    module, _ = fit(tmp_path, SpectrumMonitor(every_n_steps=2, include=["*2"], values=True), 5, loggers=[board])
    rows = list(csv.DictReader((tmp_path / "spectra.csv").open()))
    assert [(row["step"], row["layer"]) for row in rows[::8]] == [(step, "model.2") for step in ("0", "2", "4", "5")]
    values = torch.tensor([float(row["value"]) for row in rows[-8:]])
    torch.testing.assert_close(values, torch.linalg.svdvals(module.model[2].merged_weight()), rtol=1e-5, atol=1e-6)
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0}).Reload()
    assert [event.step for event in events.Histograms("spectrum/model.2")] == [0, 2, 4, 5]


@pytest.mark.parametrize(("steps", "measured"), [(4, [1, 3]), (5, [1, 3, 4])])
def test_each_step_is_measured_once_and_the_last_one_is(tmp_path, steps, measured):
    monitor = SpectrumMonitor(every_n_steps=2)
    fit(tmp_path, monitor, steps)
    assert [step for step, _ in monitor.coverage["model.0"]] == measured


def test_goes_on_after_a_resume_from_the_spectra_of_the_start(tmp_path):
    first = SpectrumMonitor(every_n_steps=2)
    _, trainer = fit(tmp_path, first, 4)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resumed = SpectrumMonitor(every_n_steps=2)
    resumed.load_state_dict(first.state_dict())
    assert all(torch.equal(resumed.start[name], values) for name, values in first.start.items())
    assert resumed.coverage["model.0"] == first.coverage["model.0"]


def test_watches_evenly_spread_layers_of_a_pattern(tmp_path):
    net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)))
    PoetLayers(block_size=4, exclude=[]).apply_(net)
    assert list(SpectrumMonitor(max_layers=3).watched(net)) == ["0", "3", "5"]
    assert list(SpectrumMonitor(include=["5"]).watched(net)) == ["5"]
    with pytest.raises(ConfigurationError, match=r"include=\['x'\] matches no mergeable layer; there are 0, 1"):
        SpectrumMonitor(include=["x"]).watched(net)
    with pytest.raises(ConfigurationError, match="every_n_steps=0: take an integer of at least 1"):
        SpectrumMonitor(every_n_steps=0)


@pytest.mark.parametrize("options", [{"block_size": 4}, {"fraction": 0.5}])
def test_coverage_counts_what_the_permutations_did(options):
    layer = PoetLinear.from_linear(nn.Linear(14, 10), seed=2, **options)
    assert isinstance(layer, Covering)
    periods = torch.zeros(14, dtype=torch.int64)
    met = torch.eye(14, dtype=torch.bool)
    for period in range(6):
        if period:
            layer.merge_()
        rotation = layer.rotation_in
        for block in rotation.permutation[: rotation.blocks * rotation.block_size].split(rotation.block_size):
            periods[block] += 1
            met[block[:, None], block] = True
    coverage = layer.coverage(sample=20000)["in"]
    assert torch.equal(coverage.periods, periods)
    off_diagonal = (met.sum() - 14) / (14 * 13)
    assert coverage.pairs == pytest.approx(float(off_diagonal), abs=0.02)
