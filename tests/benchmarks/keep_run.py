"""Keep the summary of a run among the committed results, for the tables "make fit" and "make finetune".

make fit && .venv/bin/python tests/benchmarks/keep_run.py "make fit" runs/quickstart
make finetune && .venv/bin/python tests/benchmarks/keep_run.py "make finetune" runs/finetune_quickstart
"""

import argparse
import json
import os
import platform
from pathlib import Path

import torch

from orthotrain.cli.calibrate import model_name

RUNS = Path(__file__).resolve().parent / "results/runs.json"
LEFT_OUT = ("curves", "data_digests", "config_sha256")


def main() -> None:
    """Add the run to runs.json, or replace it there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="name of the run in the tables")
    parser.add_argument("folder", type=Path, help="its run folder")
    chosen = parser.parse_args()
    summary = json.loads((chosen.folder / "summary.json").read_text())
    kept = {key: value for key, value in summary.items() if key not in LEFT_OUT}
    kept["machine"] = f"{len(os.sched_getaffinity(0))} cores of {model_name(torch.device('cpu'))}"
    kept |= {"torch": torch.__version__, "python": platform.python_version()}
    runs = json.loads(RUNS.read_text()) if RUNS.exists() else {}
    RUNS.write_text(json.dumps({**runs, chosen.name: kept}, indent=1) + "\n")


if __name__ == "__main__":
    main()
