"""Shipped baselines against the committed sweeps: a baseline with a worse rate than is known would be no fair one."""

import json
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
BASELINES = {
    "AdamW, hidden": "adamw_quickstart.yaml",
    "Muon, hidden": "options/muon.yaml",
    "GaLore r=64, hidden": "options/galore.yaml",
    "LoRA r=64,": "lora_quickstart.yaml",
}


@pytest.mark.parametrize("name", BASELINES)
def test_a_shipped_baseline_has_the_best_rate_of_the_sweep(name):
    document = json.loads((ROOT / "tests/benchmarks/results/quality.json").read_text())
    start = f"{name} lr "
    swept = {row["name"].removeprefix(start): row["bits_per_byte"] for row in document["results"]
             if row["name"].startswith(start) and row["group"] == "baselines"}  # fmt: skip
    assert len(swept) > 1
    optimization = yaml.safe_load((ROOT / "configs/pretrain" / BASELINES[name]).read_text())
    optimization = optimization["model"]["init_args"]["optimization"]
    rates = optimization.get("lr_overrides", {"": optimization.get("rotation_lr")})
    assert list(rates.values()) == [float(min(swept, key=swept.__getitem__))]
