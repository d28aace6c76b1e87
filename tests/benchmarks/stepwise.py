"""Step-wise POET against plain training: time of a layer and of a whole training step, memory, the optimizer's state.

    .venv/bin/python tests/benchmarks/stepwise.py [--rounds 10] [--widest 4096] [--storage residual] [--skip-steps]

Layers: forward and backward of StepwiseLinear relative to a trained nn.Linear, fp32 and bf16, shapes of layers.py.
Steps: forward, backward, optimizer and fold of the quickstart's network (8 x 256 tokens, bf16-mixed). Medians in one
process, rounds take turns; the peak of memory is that of a fresh process for each method: what the built network and
three steps of it take. Results in tests/benchmarks/results/stepwise.json.
"""

import argparse
import json
import platform
import runpy
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orthotrain.layers import PoetSettings, StepwiseLinear
from orthotrain.layers.folding import fold_rotations
from orthotrain.layers.poet.poet_settings import Storage
from orthotrain.layers.protocols import mergeable_layers
from orthotrain.modules import BaseModule
from orthotrain.plugins import CayleyNeumann

HERE = Path(__file__).parent
plain = runpy.run_path(str(HERE / "layers.py"))
quality = runpy.run_path(str(HERE / "quality.py"))
memory = runpy.run_path(str(HERE / "memory.py"))
ROWS, LENGTH, GROUPED = (quality[name] for name in ("BATCH", "LENGTH", "GROUPED"))
STEPS_OF_PEAK = 3
WIDEST = {**GROUPED, "block_size": 256}
RECIPES: dict[str, Callable[[], BaseModule]] = {
    "AdamW": partial(quality["adamw"], 2.5e-4),
    "Muon": partial(quality["muon"], 1e-2),
    "POET b=64": partial(quality["poet"], **GROUPED),
    "step-wise b=64": partial(quality["stepwise"], **GROUPED),
    "step-wise b=128": partial(quality["stepwise"], block_size=128, **GROUPED),
    "step-wise b=256": partial(quality["stepwise"], **WIDEST),
    "step-wise b=256, trained scale": partial(quality["stepwise"], trained_scale=True, **WIDEST),
}


def layers(rounds: int, widest: int, storage: Storage) -> dict[str, Any]:
    """Return milliseconds and the ratio to nn.Linear by shape and dtype."""
    results = {}
    routes = ("input", "weight", "auto")
    print(f"{'d/N/b, dtype':<26}{'linear ms':>10}" + "".join(f"{route:>9}" for route in routes))
    for width, tokens, block_size in (shape for shape in plain["SHAPES"] if shape[0] <= widest):
        for dtype in (torch.float32, torch.bfloat16):
            linear = nn.Linear(width, width, bias=False, dtype=dtype)
            made: dict[str, nn.Module] = {"linear": linear}
            for route in routes:
                described = PoetSettings(
                    block_size, parameterization=CayleyNeumann(2), storage=storage, stepwise=True, route=route
                )
                made[route] = StepwiseLinear.from_settings(linear, described)
            x, grad = torch.randn(tokens, width).to(dtype).requires_grad_(), torch.randn(tokens, width).to(dtype)
            runs = {name: plain["both"](module, x, grad) for name, module in made.items()}
            ms = plain["interleaved"](runs, rounds)
            name = f"{width}/{tokens}/{block_size} {str(dtype).removeprefix('torch.')}"
            results[name] = {"ms": ms, "ratio": {route: ms[route] / ms["linear"] for route in routes}}
            cells = "".join(f"{ms[route] / ms['linear']:>9.2f}" for route in routes)
            print(f"{name:<26}{ms['linear']:>10.1f}{cells}", flush=True)
    return results


def step_of(module: BaseModule, ids: Tensor) -> tuple[Callable[[], None], torch.optim.Optimizer]:
    """Return one whole training step without a trainer, and its optimizer."""
    module.configure_model()
    configured: Any = module.optimization.configure(module.model, 200)
    optimizer = configured["optimizer"] if isinstance(configured, dict) else configured
    folded = {name: layer for name, layer in mergeable_layers(module) if isinstance(layer, StepwiseLinear)}
    module.train()

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = module.loss({"input_ids": ids, "labels": ids})
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        fold_rotations(folded)

    return step, optimizer


def projections(module: BaseModule) -> set[nn.Parameter]:
    """Return what is trained of the decoder's projections: matrices, or generators in their place."""
    return {parameter for name, parameter in module.named_parameters() if "proj" in name}


def random_tokens() -> Tensor:
    """Return the tokens of a step."""
    return torch.randint(0, quality["CONFIG"]["vocab_size"], (ROWS, LENGTH))


def own_peak_mib(name: str) -> float:
    """Return the MiB that the built network and whole steps of a method take; exact only in a fresh process."""
    empty = memory["peak_resident_mib"]()
    run, _ = step_of(RECIPES[name](), random_tokens())
    for _ in range(STEPS_OF_PEAK):
        run()
    return memory["peak_resident_mib"]() - empty


def peak_mib(name: str, threads: int) -> float:
    """Return :func:`own_peak_mib` of a process of its own."""
    command = [sys.executable, __file__, "--peak-of", name, "--threads", str(threads)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def steps(rounds: int, threads: int) -> dict[str, dict[str, float]]:
    """Return milliseconds of a step, tokens a second, and MiB at the peak and of optimizer state, by method."""
    peaks = {name: peak_mib(name, threads) for name in RECIPES}
    ids, recipes = random_tokens(), {name: build() for name, build in RECIPES.items()}
    made = {name: step_of(module, ids) for name, module in recipes.items()}
    ms = plain["interleaved"]({name: step for name, (step, _) in made.items()}, rounds)
    results: dict[str, dict[str, float]] = {}
    titles = f"{'ms':>8}{'of AdamW':>10}{'tokens/s':>10}{'peak MiB':>10}{'state MiB':>11}{'of AdamW':>10}"
    print(f"\n{'whole step':<32}{titles}")
    for name, (_, optimizer) in made.items():
        held = {p: values for p, values in optimizer.state.items() if p in projections(recipes[name])}
        state = [t for values in held.values() for t in values.values() if isinstance(t, Tensor)]
        hidden = sum(t.numel() * t.itemsize for t in state) / 2**20
        speed = ROWS * LENGTH / ms[name] * 1e3
        results[name] = {"ms": ms[name], "tokens_per_s": speed, "peak_mib": peaks[name], "state_mib": hidden}
        base = results["AdamW"]
        ratio, share = ms[name] / base["ms"], hidden / base["state_mib"]
        numbers = f"{ms[name]:>8.1f}{ratio:>10.2f}{speed:>10.0f}{peaks[name]:>10.0f}{hidden:>11.1f}{share:>10.2f}"
        print(f"{name:<32}{numbers}", flush=True)
    return results


def main() -> None:
    """Measure what is asked for and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--widest", type=int, default=4096, help="leave out layers that are wider")
    parser.add_argument("--storage", choices=("dense", "residual"), default="dense", help="of the layers' weights")
    parser.add_argument("--skip-layers", action="store_true")
    parser.add_argument("--skip-steps", action="store_true")
    parser.add_argument("--peak-of", metavar="METHOD", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.peak_of:
        print(own_peak_mib(options.peak_of))
        return
    out = HERE / "results" / "stepwise.json"
    document = json.loads(out.read_text()) if out.exists() else {}
    document["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
    document["threads"] = options.threads
    if not options.skip_layers:
        part = "layers" if options.storage == "dense" else f"layers, {options.storage}"
        document[part] = layers(options.rounds, options.widest, options.storage)
    if not options.skip_steps:
        document["steps"] = steps(options.rounds, options.threads)
    out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
