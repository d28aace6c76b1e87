"""What 1,000 merges do to the singular values of a weight, for each storage, and what naive bf16 folding does.

    .venv/bin/python tests/benchmarks/folding.py [--width 1024] [--merges 1000] [--stepwise]

Angles are those of training: generators of standard deviation 0.02 / sqrt(b). Naive folding is what a plain bf16
implementation does: R = I + D rounded to bf16, both products in bf16, the weight rounded to nearest. Printed are the
largest and the mean drift of a singular value relative to the largest one, the change of the Frobenius norm, bytes a
weight, and seconds a merge; tests/benchmarks/results/folding.json keeps them. With --stepwise the layers are those that
fold every step, and permutations change at every 100th fold.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orthotrain.layers import PoetLinear, PoetSettings, StepwiseLinear, initialize_
from orthotrain.layers.spectrum import singular_values
from orthotrain.layers.weights.bf16_weight import Bf16Weight
from orthotrain.plugins import CayleyNeumann

STORAGES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16, stochastic rounding": {"storage": "bf16"},
    "bf16 + 8-bit residual": {"storage": "residual"},
    "int8, anchored": {"storage": "int8"},
    "int8, anchored every 16 merges": {"storage": "int8", "anchor_every": 16},
    "int8, never anchored": {"storage": "int8", "anchor_every": 0},
    "nf4, anchored": {"storage": "nf4"},
    "nf4, never anchored": {"storage": "nf4", "anchor_every": 0},
}


def fresh(width: int) -> nn.Linear:
    """Return a square layer with rows of norm 1."""
    linear = nn.Linear(width, width, bias=False)
    initialize_(linear.weight, "normalized", torch.Generator().manual_seed(0))
    return linear


def ours(
    width: int, block_size: int, options: dict[str, Any]
) -> tuple[Callable[[], None], Callable[[], Tensor], float]:
    """Return one merge with new angles, the weight, and bytes a value."""
    layer = PoetLinear.from_linear(fresh(width), block_size, "cayley", seed=1, **options)
    stored = sum(p.numel() * p.element_size() for p in layer.weight.parameters())

    def merge() -> None:
        for generators in layer.rotation_parameters():
            nn.init.normal_(generators, std=0.02 / block_size**0.5)
        layer.merge_()

    return merge, layer._effective_weight, stored / width**2


def stepwise(
    width: int, block_size: int, options: dict[str, Any]
) -> tuple[Callable[[], None], Callable[[], Tensor], float]:
    """Return one fold with new angles, the weight, and bytes a value."""
    rounded = options.get("storage") == "bf16"  # which settings refuse, for what is measured here
    own = {} if rounded else options
    settings = PoetSettings(block_size=block_size, parameterization=CayleyNeumann(2), stepwise=True, **own)
    layer = StepwiseLinear.from_settings(fresh(width), settings, seed=1)
    if rounded:
        layer.weight = Bf16Weight(layer.weight.dequantize())
    stored = sum(p.numel() * p.element_size() for p in layer.weight.parameters())

    def fold() -> None:
        for generators in layer.rotation_parameters():
            nn.init.normal_(generators, std=0.02 / block_size**0.5)
        (layer.merge_ if int(layer.merge_count + layer.fold_count) % 100 == 99 else layer.fold_)()

    return fold, layer._effective_weight, stored / width**2


def naive(width: int, block_size: int) -> tuple[Callable[[], None], Callable[[], Tensor], float]:
    """Return the same for bf16 rotations R and a bf16 weight rounded to nearest."""
    weight = fresh(width).weight.detach().bfloat16()
    blocks = width // block_size

    def rotation() -> Tensor:
        layer = PoetLinear.from_linear(nn.Linear(width, width, bias=False), block_size, "cayley").rotation_in
        assert layer is not None
        nn.init.normal_(layer.generators, std=0.02 / block_size**0.5)
        return (layer.displacement() + torch.eye(block_size)).detach().bfloat16()

    def merge() -> None:
        nonlocal weight
        for _ in range(2):
            rows = weight[torch.randperm(width)].view(blocks, block_size, width)
            weight = torch.bmm(rotation().mT, rows).view(width, width).T.contiguous()

    return merge, lambda: weight.float(), 2.0


def measure(run: tuple[Callable[[], None], Callable[[], Tensor], float], merges: int) -> dict[str, float]:
    """Merge and compare spectra."""
    merge, weight, size = run
    start = singular_values(weight())
    seconds = []
    for _ in range(merges):
        begin = time.perf_counter()
        merge()
        seconds.append(time.perf_counter() - begin)
    end = singular_values(weight())
    difference = (end - start).abs() / start[0]
    return {
        "largest": float(difference.max()),
        "mean": float(difference.mean()),
        "norm": float(end.norm() / start.norm()) - 1,
        "bytes": size,
        "seconds": statistics.median(seconds),
    }


def main() -> None:
    """Print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--merges", type=int, default=1000)
    parser.add_argument("--stepwise", action="store_true")
    parser.add_argument("--only", nargs="*", choices=[*STORAGES, "bf16, naive"], default=[*STORAGES, "bf16, naive"])
    options = parser.parse_args()
    torch.manual_seed(0)
    out = Path("tests/benchmarks/results/folding.json")
    results = json.loads(out.read_text())["results"] if out.exists() else {}
    print(f"{'':<34}{'largest drift':>14}{'mean':>10}{'norm':>10}{'bytes':>7}{'s/merge':>9}")
    for name in options.only:
        given = (options.width, options.block_size)
        build = stepwise if options.stepwise else ours
        run = naive(*given) if name == "bf16, naive" else build(*given, STORAGES[name])
        kind = "step-wise " if options.stepwise else ""
        row = results.setdefault(f"{kind}{options.width} x {options.merges}", {})[name] = measure(run, options.merges)
        print(f"{name:<34}{row['largest']:>14.1e}{row['mean']:>10.1e}{row['norm']:>+10.1e}{row['bytes']:>7.2f}"
              f"{row['seconds']:>9.3f}", flush=True)  # fmt: skip
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    out.write_text(json.dumps({"versions": versions, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
