"""Kernels that were asked for and cannot run: refused at the start of a run and when a layer is made; a run tells."""

import pytest
import torch
from torch import nn

from orthotrain.cli.main import main
from orthotrain.errors import ConfigurationError
from orthotrain.kernels import dispatch as backend
from orthotrain.kernels.dispatch import check_possible, use_backend
from orthotrain.layers import OftLinear, PoetLinear
from orthotrain.layers.poet.poet_settings import PoetSettings
from orthotrain.layers.poet.stepwise_linear import StepwiseLinear

QUICK = ["-c", "pretrain/poet_quickstart.yaml"]


@pytest.fixture(autouse=True)
def _chosen_by_the_environment(monkeypatch):
    """A machine with triton and without a GPU, as far as the checks look."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(backend, "_choice", None)
    monkeypatch.setattr(backend, "_missing", lambda: None)
    monkeypatch.delenv(backend.VARIABLE, raising=False)


def test_a_run_is_refused_before_its_data_is_read(small_config, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "triton")
    with pytest.raises(SystemExit) as stop:
        main(["fit", *QUICK, "-c", str(small_config), "--data.cache_dir", str(tmp_path / "cache")])
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("orthotrain: error: ")]
    assert "kernels=triton, but this runs on the CPU" in line
    assert line.endswith("ORTHOTRAIN_KERNELS=reference would run")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_a_summary_tells_which_kernels_ran(small_config, tmp_path, capsys, monkeypatch, choice):
    monkeypatch.setenv(backend.VARIABLE, choice)
    main(["fit", *QUICK, "-c", str(small_config)])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("kernels ")]
    assert line == f"{'kernels':<26}PyTorch code on the CPU"


LAYERS = {
    "PoetLinear": lambda linear: PoetLinear.from_linear(linear, 4),
    "OftLinear": lambda linear: OftLinear.from_linear(linear, 4),
    "StepwiseLinear": lambda linear: StepwiseLinear.from_settings(linear, PoetSettings(block_size=4, stepwise=True)),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_a_layer_is_refused_when_it_is_made(make):
    with use_backend("triton"):
        with pytest.raises(ConfigurationError, match="kernels=triton, but torch finds no GPU here; .*=auto or"):
            make(nn.Linear(8, 8))
        with torch.device("meta"):  # a plan computes nothing
            make(nn.Linear(8, 8))


def test_the_device_decides_where_one_is_given(monkeypatch):
    monkeypatch.setattr(backend, "_device_obstacle", lambda device: None)
    monkeypatch.setenv(backend.VARIABLE, "triton")
    check_possible(torch.device("cuda", 0))
    with pytest.raises(ValueError, match="run on CUDA devices, not on mps"):
        check_possible(torch.device("mps"))
    monkeypatch.setattr(backend, "_missing", lambda: "triton is not installed")
    with pytest.raises(ValueError, match="kernels=triton, but triton is not installed"):
        check_possible(torch.device("cuda", 0))


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_a_weight_that_nothing_multiplies_with_is_refused(make, dtype):
    linear = nn.Linear(8, 8)
    linear.weight = nn.Parameter(torch.zeros(8, 8).to(dtype), requires_grad=False)
    with pytest.raises(
        ConfigurationError, match=rf"a weight \(8, 8\) in {dtype}: take float16, .*; cast the weight, or"
    ):
        make(linear)
