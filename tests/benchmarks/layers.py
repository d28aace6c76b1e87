"""PoetLinear against a trained nn.Linear on a CPU: forward and backward, fp32 and bf16, every route.

    .venv/bin/python tests/benchmarks/layers.py [--budget 540] [--only TEXT ...] [--rounds 10] [--threads 2]

Cases that do not fit into the budget are left out by name. --only takes parts of the names of cases, such as
256/4096/64. Results go to tests/benchmarks/results/kernels_cpu.json, or into $OUT. On a CPU that other work shares,
--threads 1 counts the time of that thread alone. What a GPU does is measured by gpu.sh.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orthotrain.cli.calibrate import model_name
from orthotrain.layers.poet.route_costs import ROUTES, choose_route
from orthotrain.layers.rotation.displacement_pool import DisplacementPool

HERE = Path(__file__).parent
sys.path.append(str(HERE))  # at the end: no name there comes before that of a package

from gpu.contenders import frozen_copy, poet  # noqa: E402
from gpu.machine import commit, version  # noqa: E402

CPU = torch.device("cpu")
COLUMNS = ("frozen", *ROUTES, "auto", "pooled")
SHAPES = [
    *((256, 4096, 64), (512, 8192, 64), (512, 8192, 256), (1024, 4096, 128)),
    *((2048, 4096, 256), (4096, 2048, 256), (4096, 512, 256), (4096, 4096, 128)),
]
"""(d, N, b) of a layer as wide as long."""

Run = Callable[[], Any]


def contenders(linear: nn.Linear, block_size: int) -> dict[str, nn.Module]:
    """Return what is compared: a trained layer, PoetLinear by route, and the two products of a frozen one.

    ``pooled`` is ``auto`` as a trained network runs it: with the displacements of all its rotations in one batch.
    """
    pooled = poet(linear, block_size, route="auto")
    DisplacementPool(pooled)
    routes: dict[str, Any] = {route: poet(linear, block_size) for route in ROUTES}
    for route, layer in routes.items():
        layer._route = lambda x, route=route: route
    auto = poet(linear, block_size, route="auto")
    return {"linear": linear, "frozen": frozen_copy(linear), **routes, "auto": auto, "pooled": pooled}


def both(module: nn.Module, x: Tensor, grad: Tensor) -> Run:
    """Return a forward and backward pass that leaves no gradients."""

    def run() -> None:
        module(x).backward(grad)
        x.grad = None
        for parameter in module.parameters():
            parameter.grad = None

    return run


def interleaved(runs: dict[str, Run], rounds: int) -> dict[str, float]:
    """Return median milliseconds of each run; rounds take turns, so that a slow moment meets them all.

    One thread is timed by its own clock, which stands still while other work has its core.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 2):
        for name, run in runs.items():
            start = clock()
            run()
            if turn >= 2:
                times[name].append(1e3 * (clock() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def measured(width: int, tokens: int, block_size: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Return milliseconds, their ratio to nn.Linear, and how far the chosen route is behind the best one."""
    linear = nn.Linear(width, width, bias=False, dtype=dtype)
    x, grad = torch.randn(tokens, width).to(dtype).requires_grad_(), torch.randn(tokens, width).to(dtype)
    runs = {name: both(layer, x, grad) for name, layer in contenders(linear, block_size).items()}
    ms = interleaved(runs, rounds)
    ratio = {name: ms[name] / ms["linear"] for name in COLUMNS}
    chosen = choose_route(ROUTES, tokens, width, width, block_size, block_size, "cpu", dtype)
    behind = ratio["auto"] / min(ratio[route] for route in ROUTES) - 1
    return {"ms": ms, "ratio": ratio, "chosen": chosen, "behind_the_best_route": behind}


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=540, help="seconds after which no case is begun")
    parser.add_argument("--only", nargs="*", default=[""], help="parts of the names of cases")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    results: dict[str, Any] = {}
    skipped: list[str] = []
    deadline = time.monotonic() + options.budget
    print(f"{'d/N/b, dtype':<26}{'linear ms':>10}" + "".join(f"{name:>12}" for name in COLUMNS) + f"{'chosen':>12}")
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{'/'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"
            if not any(text in name for text in options.only):
                continue
            if time.monotonic() > deadline:
                skipped.append(name)
                continue
            found = results[f"cpu {name}"] = measured(*shape, dtype, options.rounds)
            cells = "".join(f"{value:>12.2f}" for value in found["ratio"].values())
            print(f"{name:<26}{found['ms']['linear']:>10.1f}{cells}{found['chosen']:>12}", flush=True)
    if skipped:
        print(f"left out, the budget of {options.budget:.0f} s was spent: {', '.join(skipped)}")
    document = {
        "device": f"{model_name(CPU)}, {options.threads} CPU threads",
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "peft")},
        "commit": commit(),
        "skipped": skipped,
        "results": results,
    }
    folder = Path(os.environ["OUT"]) if "OUT" in os.environ else HERE / "results"
    (folder / "kernels_cpu.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
