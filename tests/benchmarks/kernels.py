"""Kernels and layers against a trained nn.Linear and PEFT: correctness first, then time and memory.

    .venv/bin/python -P tests/benchmarks/kernels.py [--budget 540] [--only TEXT ...] [--rounds 10] [--threads 2]

With a GPU: every operation against fp64, then each alone against the bandwidth and the FLOP rate that this GPU reaches
in a copy and in a product, then forward and backward of layers in bf16, and the targets. A wrong result ends the run:
no time is reported of a wrong kernel. Without one: PoetLinear against nn.Linear on the CPU, forward and backward, in
fp32 and bf16.

Cases that do not fit into the budget are left out by name. --only takes parts of the names of cases, such as
256/4096/64 or 4096x4096. The table goes to kernels.json, or kernels_cpu.json without a GPU, in $OUT or in results/
beside this file. On a CPU that other work shares, --threads 1 counts the time of that thread alone.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from orthotrain.calibrate import model_name
from orthotrain.layers.centre import ROUTES, choose_route

HERE = Path(__file__).parent


def load(name: str) -> ModuleType:
    """Import a file beside this one, whose folder is not on the path: there it would shadow Hugging Face's kernels."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cases = load("kernel_cases")

CPU_SHAPES = [
    *((256, 4096, 64), (512, 8192, 64), (512, 8192, 256), (1024, 4096, 128)),
    *((2048, 4096, 256), (4096, 2048, 256), (4096, 512, 256), (4096, 4096, 128)),
]


class Session:
    """The budget, the cases that are wanted, and what has been found."""

    def __init__(self, budget: float, only: list[str], rounds: int) -> None:
        self.deadline = time.monotonic() + budget
        self.only, self.rounds = only, rounds
        self.results: dict[str, Any] = {}
        self.skipped: list[str] = []

    def wants(self, name: str) -> bool:
        """Return whether to run a case; one that the budget leaves out is noted."""
        if self.only and not any(text in name for text in self.only):
            return False
        if time.monotonic() > self.deadline:
            self.skipped.append(name)
            return False
        return True


def cpu_layers(session: Session) -> None:
    """Forward and backward of PoetLinear relative to a trained nn.Linear; ``frozen`` is two of its three products."""
    columns = ("frozen", *ROUTES, "auto", "pooled")
    print(f"{'d/N/b, dtype':<26}{'linear ms':>10}" + "".join(f"{name:>12}" for name in columns) + f"{'chosen':>12}")
    for width, tokens, block_size in CPU_SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            name = f"cpu {width}/{tokens}/{block_size} {str(dtype).removeprefix('torch.')}"
            if not session.wants(name):
                continue
            linear = nn.Linear(width, width, bias=False, dtype=dtype)
            layers = cases.cpu_contenders(linear, block_size)
            layers["product"], layers["contraction"] = layers.pop("weight"), cases.poet(linear, block_size, "weight")
            for route in ROUTES:
                layers[route]._route = lambda x, route=route: route
            x, grad = torch.randn(tokens, width).to(dtype).requires_grad_(), torch.randn(tokens, width).to(dtype)
            runs = {key: cases.passes(layer, x, grad, "auto")[1] for key, layer in layers.items()}
            ms = cases.interleaved(runs, torch.device("cpu"), session.rounds)
            ratio = {key: ms[key] / ms["linear"] for key in columns}
            chosen = choose_route(ROUTES, tokens, width, width, block_size, block_size, "cpu", dtype)
            behind = ratio["auto"] / min(ratio[route] for route in ROUTES) - 1
            session.results[name] = {"ms": ms, "ratio": ratio, "chosen": chosen, "behind_the_best_route": behind}
            cells = "".join(f"{value:>12.2f}" for value in ratio.values())
            print(f"{name[4:]:<26}{ms['linear']:>10.1f}{cells}{chosen:>12}", flush=True)


def document(session: Session, device: torch.device, threads: int) -> dict[str, Any]:
    """Return everything that was found, and on what."""
    command = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(command, cwd=HERE, capture_output=True, text=True).stdout.strip() or None
    installed = {found.name for found in importlib.metadata.distributions()}
    names = [name for name in ("torch", "triton", "peft") if name in installed]
    return {
        "device": model_name(device) + (f", {threads} CPU threads" if device.type == "cpu" else ""),
        "cpu": model_name(torch.device("cpu")),
        "versions": {"python": platform.python_version()} | {n: importlib.metadata.version(n) for n in names},
        "commit": commit,
        "skipped": session.skipped,
        "results": session.results,
    }


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=540, help="seconds after which no case is begun")
    parser.add_argument("--only", nargs="*", default=[], help="parts of the names of cases")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    session = Session(options.budget, options.only, options.rounds)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    right = True
    if device.type == "cuda":
        for name in ("kernel_accuracy", "kernel_floors"):
            load(name)
        right = load("kernel_gpu").measure(session, device)
    else:
        torch.set_num_threads(options.threads)
        cpu_layers(session)
    if session.skipped:
        print(f"left out, the budget of {options.budget:.0f} s was spent: {', '.join(session.skipped)}")
    folder = Path(os.environ["OUT"]) if "OUT" in os.environ else HERE / "results"
    found = json.dumps(document(session, device, options.threads), indent=1)
    (folder / ("kernels.json" if device.type == "cuda" else "kernels_cpu.json")).write_text(found + "\n")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
