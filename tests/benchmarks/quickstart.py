"""What the quickstart reaches against POET as published, AdamW and Muon: same network, data, tokens, schedule and seed.

    .venv/bin/python tests/benchmarks/quickstart.py --threads 2
    .venv/bin/python tests/benchmarks/quickstart.py --only Muon --trainer.max_steps 4    # a trial, which writes nothing

Rates are chosen on the whole validation split. The best run of each method is then evaluated once on the test split.
Runs are kept in runs/benchmark: one that has ended is not repeated while config and options are the same, one that was
stopped continues. The values go to tests/benchmarks/results/quickstart.json when all methods have ended.
"""

import argparse
import contextlib
import hashlib
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
import yaml
from tables import chosen

from orthotrain.cli.config_files import resolve_config, resolve_config_arguments
from orthotrain.cli.trainer_cli import OrthotrainCLI

OUT = Path("tests/benchmarks/results/quickstart.json")
KEYS = {"rotation": "rotation_lr", "hidden": "lr_overrides", "rest": "lr"}
"""Name of a learning rate -> its key in ``optimization``. ``rest`` is that of embeddings, head and norms."""


def of_both(hidden: tuple[float, ...]) -> list[dict[str, float]]:
    """Return every pair of a rate of the hidden matrices and a rate of the rest."""
    return [{"hidden": rate, "rest": rest} for rate in hidden for rest in (4e-3, 8e-3)]


RUNS: dict[str, tuple[str, list[dict[str, float]]]] = {
    "step-wise": ("pretrain/quickstart.yaml", [{}]),
    "POET as published": ("pretrain/poet_quickstart.yaml", [{"rotation": rate} for rate in (1e-3, 2e-3, 4e-3)]),
    "AdamW": ("pretrain/adamw_quickstart.yaml", of_both((2.5e-4, 5e-4, 1e-3))),
    "Muon": ("pretrain/muon_quickstart.yaml", of_both((5e-3, 1e-2, 2e-2))),
}
"""Method -> its config, and the learning rates of its runs; the config has those that a run does not name."""


def arguments_of(config: str, rates: dict[str, float]) -> list[str]:
    """Return the arguments of `orthotrain fit` for a config with other learning rates."""
    values = {"hidden": "{{'*layers*proj*': {}}}"}
    return ["-c", config, *(f"--model.optimization.{KEYS[name]}={values.get(name, '{}').format(rate)}"
                            for name, rate in rates.items())]  # fmt: skip


def folder_of(config: str, rates: dict[str, float], extra: list[str]) -> Path:
    """Return the folder of a run: another one for other settings, but for those of the report."""
    content = {**yaml.safe_load(Path(resolve_config(config)).read_text()), "report": None}
    for name in rates:  # replaced by an option
        content["model"]["init_args"]["optimization"].pop(KEYS[name], None)
    digest = hashlib.sha256(json.dumps([content, rates, extra]).encode()).hexdigest()[:8]
    return Path("runs/benchmark") / f"{Path(config).stem}-{digest}"


def command(name: str, folder: Path, arguments: list[str]) -> OrthotrainCLI:
    """Run a command of `orthotrain` on the newest checkpoint of a folder, if there is one."""
    given = [*arguments, "--run_folder", str(folder), "--ckpt_path", "last"]
    with Path(os.devnull).open("w") as nothing, contextlib.redirect_stdout(nothing):
        return OrthotrainCLI([name, *resolve_config_arguments(given)])


def run(method: str, rates: dict[str, float], extra: list[str]) -> dict[str, Any]:
    """Train one configuration to its end, unless that has been done, and return its row."""
    config = RUNS[method][0]
    arguments, folder = arguments_of(config, rates), folder_of(config, rates, extra)
    if not (folder / "summary.json").exists():
        command("fit", folder, [*arguments, *extra])
    after = json.loads((folder / "summary.json").read_text())["after"]
    row = {"method": method, "rates": rates, "arguments": arguments, "val_bits_per_byte": after["val_bits_per_byte"]}
    print(f"{method:<20}{rates or ''!s:<38}{row['val_bits_per_byte']:.4f} bits per byte", flush=True)
    return row


def tested(row: dict[str, Any], extra: list[str]) -> float:
    """Return the bits per byte of a run on the test split; the run folder keeps them."""
    folder = folder_of(RUNS[row["method"]][0], row["rates"], extra)
    kept = folder / "test.json"
    if not kept.exists():
        metrics = command("test", folder, [*row["arguments"], *extra]).trainer.callback_metrics
        kept.write_text(json.dumps({name: float(value) for name, value in metrics.items()}))
    return json.loads(kept.read_text())["test_bits_per_byte"]


def main() -> None:
    """Run what is missing, and print each figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=RUNS, default=list(RUNS), help="methods, all by default")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    given, extra = parser.parse_known_args()
    torch.set_num_threads(given.threads)
    rows = [run(method, rates, extra) for method in given.only for rates in RUNS[method][1]]
    for row in chosen(rows).values():
        row["test_bits_per_byte"] = tested(row, extra)
        print(f"{row['method']:<20}{row['rates'] or ''!s:<38}{row['test_bits_per_byte']:.4f} on the test split")
    if not extra and len(given.only) == len(RUNS):
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        OUT.write_text(json.dumps({"versions": versions, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
