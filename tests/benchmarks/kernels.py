"""Kernels and layers against a trained nn.Linear and PEFT: correctness first, then time and memory.

    .venv/bin/python -P tests/benchmarks/kernels.py [--budget 540] [--only TEXT ...] [--rounds 10] [--threads 2]

With a GPU: every operation against fp64, then forward and backward of layers in bf16, and of the bare kernels against
the bandwidth and the FLOP rate that this GPU reaches in a copy and in a product. A wrong result ends the run: no time
is reported of a wrong kernel. Without one: PoetLinear against nn.Linear on the CPU, forward and backward, in fp32 and
bf16.

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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from orthotrain.calibrate import model_name
from orthotrain.layers.centre import ROUTES, choose_route

HERE = Path(__file__).parent
_spec = importlib.util.spec_from_file_location("kernel_cases", HERE / "kernel_cases.py")
assert _spec is not None and _spec.loader is not None
cases = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cases)

CPU_SHAPES = [
    *((256, 4096, 64), (512, 8192, 64), (512, 8192, 256), (1024, 4096, 128)),
    *((2048, 4096, 256), (4096, 2048, 256), (4096, 512, 256), (4096, 4096, 128)),
]
GPU_SHAPES = [(4096, 4096), (14336, 4096), (4096, 14336), (1024, 1024), (512, 512)]
GPU_BLOCKS = [256, 32, 64, 128, 512]
GPU_TOKENS = [16384, 2048, 512]


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
            behind = ratio[chosen] / min(ratio[route] for route in ROUTES) - 1
            session.results[name] = {"ms": ms, "ratio": ratio, "chosen": chosen, "behind_the_best_route": behind}
            cells = "".join(f"{value:>12.2f}" for value in ratio.values())
            print(f"{name[4:]:<26}{ms['linear']:>10.1f}{cells}{chosen:>12}", flush=True)


def gpu_correctness(session: Session, device: torch.device) -> bool:
    """Hold every operation to fp64; return whether all were right."""
    right = True
    for dtype, limit in cases.LIMITS.items():
        worst: dict[str, float] = {}
        for shape in cases.CHECKED:
            for permuted in (False, True):
                found = cases.errors(shape, dtype, permuted, device)
                for key, error in found.items():
                    if error > limit:
                        print(f"WRONG: {key} {shape} {dtype} permuted={permuted}: {error:.1e} > {limit:.1e}")
                        right = False
                    worst[key] = max(worst.get(key, 0.0), error)
        session.results[f"error {dtype}"] = worst
        print(f"{dtype}: " + ", ".join(f"{key} {error:.1e}" for key, error in worst.items()))
    return right


def gpu_kernels(session: Session, device: torch.device) -> None:
    """Rotations alone: time and the share of the floor, with both routes of a permutation."""
    bandwidth, rate = session.results["ceilings"]
    print(f"\n{'rotation N x d, b':<34}{'forward us':>11}{'floor':>7}{'backward us':>13}{'floor':>7}")
    for tokens, width in ((16384, 4096), (2048, 4096), (16384, 14336)):
        for block_size in (32, 64, 256):
            for route in ("natural", "fused", "passes"):
                name = f"rotation {tokens}x{width} b={block_size} {route}"
                if not session.wants(name):
                    continue
                with cases.permutation_route(route):
                    ms = rotation_ms(tokens, width, block_size, route != "natural", session.rounds, device)
                row = {}
                for part, (moved, flops) in cases.floors(tokens, width, block_size).items():
                    floor = 1e3 * max(moved / bandwidth, flops / rate)
                    row[part] = {"us": 1e3 * ms[part], "share_of_floor": floor / ms[part]}
                session.results[name] = row
                cells = "".join(
                    f"{r['us']:>{w}.0f}{r['share_of_floor']:>7.2f}" for r, w in zip(row.values(), (11, 13), strict=True)
                )
                print(f"{name[9:]:<34}{cells}")


def gpu_layers(session: Session, device: torch.device) -> None:
    """Layers in bf16: forward, forward and backward, and peak memory, relative to a trained nn.Linear."""
    print(f"\n{'out x in, N, b':<26}{'ms':>8}  forward + backward relative to nn.Linear")
    for name, d_out, d_in, tokens, block_size in gpu_cases():
        if not session.wants(name):
            continue
        linear = nn.Linear(d_in, d_out, bias=False, dtype=torch.bfloat16, device=device)
        x = torch.randn(tokens, d_in, dtype=torch.bfloat16, device=device, requires_grad=True)
        grad = torch.randn(tokens, d_out, dtype=torch.bfloat16, device=device)
        layers = cases.plain_layers(linear) | cases.block_layers(linear, block_size)
        runs = {key: cases.passes(layer, x, grad, choice) for key, (layer, choice) in layers.items()}
        forward = cases.interleaved({k: run[0] for k, run in runs.items()}, device, session.rounds, repeat=2)
        both = cases.interleaved({k: run[1] for k, run in runs.items()}, device, session.rounds, repeat=2)
        row = {
            key: {"forward_ms": forward[key], "both_ms": both[key], "peak_mib": cases.peak_mib(run[1], device)}
            for key, run in runs.items()
        }
        session.results[name] = row
        base = both["nn.Linear"]
        print(f"{name[6:]:<26}{base:>8.3f}  " + ", ".join(f"{k} {v / base:.2f}" for k, v in both.items() if v != base))


def gpu_cases() -> Iterator[tuple[str, int, int, int, int]]:
    """Yield name, out, in, tokens and block size, those that matter most first."""
    for block_size in GPU_BLOCKS:
        for d_out, d_in in GPU_SHAPES:
            for tokens in GPU_TOKENS:
                yield f"layer {d_out}x{d_in} N={tokens} b={block_size}", d_out, d_in, tokens, block_size


def rotation_ms(
    tokens: int, width: int, block_size: int, permuted: bool, rounds: int, device: torch.device
) -> dict[str, float]:
    """Return milliseconds of a rotation and of its backward pass, without autograd."""
    from orthotrain.kernels.block_rotate import triton

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16, device=device)

    x, grad, displacement = draw(tokens, width), draw(tokens, width), draw(width // block_size, block_size, block_size)
    order = torch.randperm(width, device=device) if permuted else None
    runs = {
        "forward": lambda: triton.block_rotate_forward(x, displacement, order, None),
        "backward": lambda: triton.block_rotate_backward(grad, x, displacement, order, None),
    }
    return cases.interleaved(runs, device, rounds, repeat=5)


def document(session: Session, device: torch.device, threads: int) -> dict[str, Any]:
    """Return everything that was found, and on what."""
    command = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(command, cwd=HERE, capture_output=True, text=True).stdout.strip() or None
    installed = {found.name for found in importlib.metadata.distributions()}
    names = [name for name in ("torch", "triton", "peft") if name in installed]
    return {
        "device": model_name(device) + (f", {threads} CPU threads" if device.type == "cpu" else ""),
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
        right = gpu_correctness(session, device)
        if right:
            session.results["ceilings"] = bandwidth, rate = cases.ceilings(device)
            print(f"copy {bandwidth / 1e12:.2f} TB/s, bf16 product {rate / 1e12:.0f} TFLOP/s")
            gpu_kernels(session, device)
            gpu_layers(session, device)
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
