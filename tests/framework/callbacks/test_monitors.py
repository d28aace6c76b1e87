"""Orthogonality, throughput and the run report against values computed by hand."""

import lightning as L
import pytest
import torch
from torch import nn

from orthotrain.callbacks import Throughput
from orthotrain.callbacks.orthogonality_monitor import rotation_state
from orthotrain.callbacks.run_report import RunReport, draw_curves, singular_values, spectrum_drift
from orthotrain.layers import PoetLinear, mergeable_layers, replace_linears


@pytest.fixture
def network(randomize):
    net = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 8))
    replace_linears(net, ["*"], (), lambda linear: PoetLinear.from_linear(linear, 8))
    return randomize(net, 0.1)


def test_rotation_state_is_the_worst_block(network):
    norm, error = rotation_state(network)
    layers = [layer for _, layer in mergeable_layers(network)]
    assert norm == max(p.norm(dim=1).max() for layer in layers for p in layer.rotation_parameters())
    rotations = [d.double() + torch.eye(8) for layer in layers for d in layer.displacements()]
    expected = max((r.mT @ r - torch.eye(8)).abs().max() for r in rotations)
    assert abs(error - expected) < 1e-6


def test_spectrum_drift_sees_a_scaled_weight_and_no_merge(network):
    start = singular_values(network, 8)
    assert set(start) == {"0", "1"}
    for _, layer in mergeable_layers(network):
        layer.merge_()
    assert spectrum_drift(network, start) < 1e-5
    with torch.no_grad():
        network[1].weight.values.mul_(1.01)
    assert spectrum_drift(network, start) == pytest.approx(0.01, rel=1e-3)


def test_curves_are_a_picture_also_when_empty(tmp_path):
    curves = {"train_loss": [(1, 3.0), (2, 2.5)], "val_loss": []}
    assert draw_curves(curves, tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert draw_curves({"train_loss": []}, tmp_path / "b.png").exists()


def test_the_report_goes_on_after_a_resume():
    report = RunReport()
    report.before, report.curves["val_loss"] = {"val_loss": 4.0}, [(1, 4.0)]
    resumed = RunReport()
    resumed.load_state_dict(report.state_dict())
    assert resumed.before == {"val_loss": 4.0} and resumed.curves["val_loss"] == [(1, 4.0)]


def test_throughput_counts_tokens_of_training_steps_only():
    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 1)

        def training_step(self, batch, batch_idx):
            return self.layer(batch["input_ids"].float()).mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    throughput = Throughput()
    trainer = L.Trainer(
        max_steps=5,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=2,
        callbacks=[throughput],
    )
    rows = [{"input_ids": torch.ones(4, dtype=torch.int64)}] * 30
    trainer.fit(Module(), torch.utils.data.DataLoader(rows, batch_size=3))
    assert throughput._tokens == 5 * 12 and throughput.mean > 0
    assert trainer.callback_metrics["tokens_per_second"] > 0
