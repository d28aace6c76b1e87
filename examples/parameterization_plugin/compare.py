"""Pretrain the quickstart's network for a few steps with the plugin's rotations and with built-in ones, by name.

    .venv/bin/pip install --no-deps --no-build-isolation -e examples/parameterization_plugin
    .venv/bin/python examples/parameterization_plugin/compare.py

Every run is `orthotrain fit` with a configuration that this program writes. The runs differ only in the name of
the parameterization.
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
from pathlib import Path

import yaml

FIT = [sys.executable, "-P", "-c", "import sys; from orthotrain.cli.main import main; sys.exit(main())", "fit"]
"""The `orthotrain` command of the environment that runs this program."""


def configuration(name: str, folder: Path, steps: int) -> dict:
    """Return the settings that differ from those of the config underneath."""
    place = {"save_dir": str(folder), "name": "", "version": ""}
    return {
        "trainer": {
            "max_steps": steps,
            "val_check_interval": steps,
            "limit_val_batches": 20,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 5,
            "enable_progress_bar": False,
            "default_root_dir": str(folder),
            "logger": [{"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": place}],
            "callbacks": [{"class_path": "RunReport"}],
        },
        "model": {"init_args": {"merge_every": 20, "layers": {"parameterization": name, "block_size": 16}}},
    }


def run(name: str, folder: Path, steps: int, base: list[str]) -> dict[str, float]:
    """Train with the parameterization ``name`` and return its loss, speed and error of orthogonality."""
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "parameterization.yaml"
    config.write_text(yaml.safe_dump(configuration(name, folder, steps)))
    subprocess.run([*FIT, *base, "-c", str(config)], check=True, stdout=subprocess.DEVNULL)
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    speeds, errors = (
        [float(row[key]) for row in rows if row[key]] for key in ("tokens_per_second", "orthogonality_error")
    )
    return {
        "loss": json.loads((folder / "summary.json").read_text())["after"]["val_loss"],
        "speed": statistics.median(speeds),
        "error": max(errors),
    }


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Run every name and print one line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", default=["cayley", "exponential", "givens"])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("runs/parameterization_plugin"))
    parser.add_argument("--base", nargs="+", default=["pretrain/poet_quickstart.yaml"], help="configs underneath")
    chosen = parser.parse_args(arguments)
    base = [part for config in chosen.base for part in ("-c", config)]
    results = {}
    print(f"{'parameterization':<18}{'validation loss':>15}{'tokens per second':>19}{'max|R^T R - I|':>16}")
    for name in chosen.names:
        one = results[name] = run(name, chosen.out / name, chosen.steps, base)
        print(f"{name:<18}{one['loss']:>15.4f}{one['speed']:>19,.0f}{one['error']:>16.1e}", flush=True)
    return results


if __name__ == "__main__":
    main()
