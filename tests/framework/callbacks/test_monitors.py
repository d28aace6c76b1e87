"""Orthogonality, throughput and the run report against values computed by hand."""

import types

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, default_collate

from orthotrain.callbacks import Throughput, throughput
from orthotrain.callbacks.orthogonality_monitor import OrthogonalityMonitor, rotation_states
from orthotrain.callbacks.run_report import RunReport
from orthotrain.console.run_summary import summary_lines
from orthotrain.errors import ConfigurationError
from orthotrain.layers import LoraLinear, PoetLinear, StepwiseLinear, mergeable_layers, replace_linears
from orthotrain.layers.spectrum import affordable_layers, spectra, spectral_bound, spectrum_drift
from orthotrain.modules import PoetLayers, PoetModule


@pytest.fixture
def network(randomize):
    net = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 8))
    replace_linears(net, ["*"], (), lambda linear: PoetLinear.from_linear(linear, 8))
    return randomize(net, 0.1)


def test_rotation_states_are_those_of_each_layers_worst_block(network):
    states = rotation_states(network)
    assert set(states) == {"0", "1"}
    for name, layer in mergeable_layers(network):
        bounds = torch.cat([spectral_bound(p) for p in layer.rotation_parameters()])
        rotations = [d.double() + torch.eye(8) for d in layer.displacements()]
        expected = max((r.mT @ r - torch.eye(8)).abs().max() for r in rotations)
        assert states[name][0] == float(bounds.max()) and abs(states[name][1] - expected) < 1e-6


def test_layers_without_rotations_have_no_state():
    net = nn.Sequential(nn.Linear(8, 8))
    replace_linears(net, ["*"], (), lambda linear: LoraLinear.from_linear(linear, 2))
    assert rotation_states(net) == {} and rotation_states(nn.Linear(2, 2)) == {}


@pytest.mark.parametrize("per_layer", [False, True])
def test_orthogonality_is_logged_for_the_model_and_if_asked_for_by_layer(network, per_layer):
    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.logged = network, {}

        def log(self, name, value, **_):
            self.logged[name] = value

        def log_dict(self, values, **_):
            self.logged |= values

    module, trainer = Module(), types.SimpleNamespace(log_every_n_steps=2, global_step=0)
    monitor = OrthogonalityMonitor(per_layer=per_layer)
    monitor.on_before_optimizer_step(trainer, module, None)
    assert not module.logged
    trainer.global_step = 1
    monitor.on_before_optimizer_step(trainer, module, None)
    states = rotation_states(module)
    assert module.logged["generator_norm"] == max(state[0] for state in states.values()) > 0
    names = {name for name in module.logged if "/" in name}
    expected = {f"{kind}/{layer}" for kind in ("generator_norm", "orthogonality_error") for layer in states}
    assert names == (expected if per_layer else set())
    with pytest.raises(
        ConfigurationError, match="OrthogonalityMonitor: every_n_steps=0: take an integer of at least 1"
    ):
        OrthogonalityMonitor(0)


def test_spectrum_drift_sees_a_scaled_weight_and_no_merge(network):
    start = spectra(network, ["0", "1"])
    for _, layer in mergeable_layers(network):
        layer.merge_()
    assert spectrum_drift(network, start) < 1e-5
    with torch.no_grad():
        network[1].weight.values.mul_(1.01)
    assert spectrum_drift(network, start) == pytest.approx(0.01, rel=1e-3)


def test_a_report_watches_every_layer_of_a_small_network(monkeypatch, tmp_path):
    net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(12)))
    PoetLayers(block_size=4, exclude=[]).apply_(net)
    report = RunReport()
    report.on_fit_start(None, net)
    assert list(report.spectra) == [str(k) for k in range(12)]
    with torch.no_grad():
        net[9].weight.values.mul_(1.01)
    assert spectrum_drift(net, report.spectra) == pytest.approx(0.01, rel=1e-3)
    monkeypatch.setattr("orthotrain.layers.spectrum.COST", 1.0)  # as if the layers were large
    assert affordable_layers(net) == 8
    resumed = RunReport(spectrum_layers=2)
    resumed.load_state_dict(report.state_dict())
    resumed.on_fit_start(None, net)
    assert len(resumed.spectra) == 12, "those of the checkpoint"
    report.spectra["missing"] = report.spectra["0"]
    with pytest.raises(ConfigurationError, match="spectra of other layers"):
        report.on_fit_start(None, net)
    with pytest.raises(ConfigurationError, match="RunReport: spectrum_layers=-1: take an integer of at least 0"):
        RunReport(spectrum_layers=-1)


def test_the_report_goes_on_after_a_resume():
    report = RunReport()
    report.before, report.curves["val_loss"] = {"val_loss": 4.0}, [(1, 4.0)]
    report.spent = {"tokens": 512, "seconds": 90.0}
    resumed, state = RunReport(), report.state_dict()
    resumed.load_state_dict(state)
    assert resumed.spent["tokens"] == 512 and resumed.state_dict()["spent"]["seconds"] > 90
    del state["spent"]  # a checkpoint of an earlier version
    RunReport().load_state_dict(state)
    assert resumed.before == {"val_loss": 4.0} and resumed.curves["val_loss"] == [(1, 4.0)]


def test_early_folds_are_reported_also_where_no_period_has_ended(tmp_path):
    base = {"steps": 5, "after": {}, "tokens_per_second": None, "kernels": "reference", "trainable_parameters": 1,
            "memory": None, "next_token_loss": None, "total_parameters": 2, "spectrum_drift": None,
            "checkpoint": None, "references": None, "before": {}, "data": {}, "tokens": None,
            "wall_seconds": 3.0}  # fmt: skip
    for merges, early, line in (
        (None, 7, "0, and 7 early"),
        (2, 7, "2, and 7 early"),
        (2, None, "2"),
        (None, None, None),
    ):
        rows = summary_lines({**base, "merges": merges, "early_folds": early}, tmp_path)
        (found,) = [row.split(None, 1)[1] for row in rows if row.startswith("merges")] or [None]
        assert found == line or found.startswith(line)


class Slow(L.LightningModule):
    """Advances a clock where the clock of the throughput runs, and where it stands still."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.clock = 0.0

    def training_step(self, batch, batch_idx):
        self.clock += 100 if self.global_step == 0 else 1  # the first step is not counted
        return self.layer(batch["input_ids"].float()).mean()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.clock += 2  # as a merge would, in a callback

    def validation_step(self, batch, batch_idx):
        self.clock += 1000

    def on_save_checkpoint(self, checkpoint):
        self.clock += 1000

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_throughput_counts_all_of_training_and_nothing_else(tmp_path, monkeypatch):
    callback, module = Throughput(), Slow()
    monkeypatch.setattr(throughput, "perf_counter", lambda: module.clock)
    trainer = L.Trainer(
        max_steps=5,
        accumulate_grad_batches=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        log_every_n_steps=2,
        val_check_interval=4,
        num_sanity_val_steps=0,
        callbacks=[callback, ModelCheckpoint(every_n_train_steps=2, save_top_k=-1)],
    )
    rows = [{"input_ids": torch.ones(4, dtype=torch.int64)}] * 30
    trainer.fit(module, DataLoader(rows, batch_size=3), DataLoader(rows[:1]))
    # two batches a step, 1 + 2 seconds each; the clock starts before the callbacks that follow the first step
    assert callback.counted == (4 * 2 * 12, 4 * 2 * 3 + 2)
    assert callback.mean == 96 / 26 and trainer.callback_metrics["tokens_per_second"] == 4
    assert module.clock > 4000 and "save_checkpoint" not in vars(trainer)


class Timed(PoetModule):
    """A batch takes a second of :attr:`clock`, which only this test moves."""

    clock = 0.0

    def loss(self, batch):
        Timed.clock += 1
        return self(batch["input_ids"].float()).square().mean()


def slowly(function):
    def slow(*arguments):
        Timed.clock += 10
        return function(*arguments)

    return slow


@pytest.mark.parametrize(("slow", "least"), [("nothing", 3), ("data", 23), ("merge", 13), ("fold", 43)])
def test_slow_data_a_slow_merge_and_a_slow_fold_lower_the_throughput(slow, least, monkeypatch, tmp_path):
    """Of four steps the last three are counted, with the only merge after the last one, and with all folds."""
    layer, rows = StepwiseLinear if slow == "fold" else PoetLinear, [torch.ones(4)] * 4
    monkeypatch.setattr(throughput, "perf_counter", lambda: Timed.clock)
    if slow in ("merge", "fold"):
        monkeypatch.setattr(layer, f"{slow}_", slowly(getattr(layer, f"{slow}_")))
    collate = slowly(default_collate) if slow == "data" else default_collate
    data = DataLoader([{"input_ids": row} for row in rows], collate_fn=collate)
    period = {"stepwise": True} if slow == "fold" else {"merge_every": 4}
    module = Timed(nn.Sequential(nn.Linear(4, 4)), PoetLayers(block_size=2, exclude=[]), **period)
    callback = Throughput()
    options = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = L.Trainer(max_steps=4, accelerator="cpu", callbacks=[callback], default_root_dir=tmp_path, **options)
    trainer.fit(module, data)
    tokens, seconds = callback.counted
    assert tokens == 3 * 4 and (seconds >= least if slow == "data" else seconds == least)
    assert callback.mean == tokens / seconds


def test_a_run_of_one_step_has_no_throughput(tmp_path):
    callback = Throughput()
    options = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = L.Trainer(max_steps=1, accelerator="cpu", callbacks=[callback], default_root_dir=tmp_path, **options)
    trainer.fit(Slow(), DataLoader([{"input_ids": torch.ones(4, dtype=torch.int64)}]))
    assert callback.mean == 0.0 and "tokens_per_second" not in trainer.callback_metrics
