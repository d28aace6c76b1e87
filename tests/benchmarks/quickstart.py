"""What the quickstart reaches against AdamW with swept learning rates: same network, data, tokens, schedule and seed.

    .venv/bin/python tests/benchmarks/quickstart.py [--only NAME ...]

Every run is `orthotrain fit` with overrides. Finished runs are kept in runs/benchmark and not repeated. The table and
tests/benchmarks/results/quickstart.json hold validation bits per byte.
"""

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path

import torch

BASE = ["-c", "pretrain/quickstart.yaml"]
ADAMW = ["-c", "pretrain/adamw_quickstart.yaml"]
RUNS: dict[str, list[str]] = {"poet quickstart": BASE}
for rotation in ("1.0e-3", "4.0e-3"):
    RUNS[f"poet rotation lr {rotation}"] = [*BASE, f"--model.optimization.rotation_lr={rotation}"]
for lr in ("1.0e-3", "2.0e-3", "4.0e-3"):
    RUNS[f"adamw lr {lr}"] = [*ADAMW, f"--model.optimization.lr={lr}", "--model.optimization.lr_overrides={}"]
for hidden in ("1.25e-4", "2.5e-4", "5.0e-4", "1.0e-3"):
    overrides = f"--model.optimization.lr_overrides={{'*layers*proj*': {hidden}}}"
    RUNS[f"adamw hidden {hidden}"] = [*ADAMW, overrides]


def run(name: str, arguments: list[str]) -> dict[str, float]:
    """Train one configuration, or read what an earlier call left."""
    folder = Path("runs/benchmark") / name.replace(" ", "_")
    summary = folder / "summary.json"
    if not summary.exists():
        place = {"save_dir": str(folder), "name": "", "version": ""}
        loggers = json.dumps([{"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": place}])
        overrides = [f"--trainer.default_root_dir={folder}", f"--trainer.logger={loggers}"]
        command = [str(Path(sys.executable).with_name("orthotrain")), "fit", *arguments, *overrides]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads(summary.read_text())["after"]


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", help="names of runs, all by default")
    names = parser.parse_args().only or list(RUNS)
    results = {}
    for name in names:
        results[name] = run(name, RUNS[name])
        print(f"{name:<36}{results[name]['val_bits_per_byte']:.4f} bits per byte", flush=True)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    out = Path("tests/benchmarks/results/quickstart.json")
    out.write_text(json.dumps({"versions": versions, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
