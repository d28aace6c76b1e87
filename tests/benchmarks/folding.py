"""What folds do to the singular values of a weight: the worst over a whole run, for each storage and parameterization.

    .venv/bin/python tests/benchmarks/folding.py [GROUP ...]

A drift is the change of a singular value relative to the largest one, from the weight as it was first stored. It is
measured after each merge, or after each 7th fold of layers that fold every step. The table has the largest drift over
all measurements and all singular values, the merge of that drift, the mean over both, the change of the Frobenius norm
that is farthest from zero, the drift of the first storing from the weight before, bytes a weight and seconds a merge.

Generators of the storages have the standard deviation 0.02 / sqrt(b): ||Q||_2 is about 0.04, a turn of 0.08 rad. Those
of the parameterizations are scaled to the norm in the name. Step-wise layers draw new permutations at every 100th fold.
Naive folding is what a plain bf16 implementation does: R = I + D rounded to bf16, both products in bf16, the weight
rounded to nearest. tests/benchmarks/results/folding.json keeps the results.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orthotrain.layers import PoetLinear, PoetSettings, StepwiseLinear, initialize_
from orthotrain.layers.spectrum import singular_values, spectral_drift
from orthotrain.layers.weights.bf16_weight import Bf16Weight
from orthotrain.plugins import Cayley, CayleyNeumann, Exponential, Parameterization

OUT = Path(__file__).parent / "results/folding.json"
BLOCK_SIZE = 64


@dataclass
class Fold:
    """A layer that is folded again and again: one fold, its weight, and bytes a value."""

    fold: Callable[[], None]
    weight: Callable[[], Tensor]
    bytes: float


def fresh(width: int) -> nn.Linear:
    """Return a square layer with rows of norm 1."""
    linear = nn.Linear(width, width, bias=False)
    initialize_(linear.weight, "normalized", torch.Generator().manual_seed(0))
    return linear


def draw_(generators: Tensor, norm: float | None) -> None:
    """Draw generators as in training, or with blocks of a norm ``||Q||_2``."""
    nn.init.normal_(generators, std=0.02 / BLOCK_SIZE**0.5)
    if norm is not None:
        rows, columns = torch.triu_indices(BLOCK_SIZE, BLOCK_SIZE, 1)
        blocks = generators.new_zeros(len(generators), BLOCK_SIZE, BLOCK_SIZE)
        blocks[:, rows, columns] = generators.detach()
        generators.data *= norm / torch.linalg.matrix_norm(blocks - blocks.mT, 2)[:, None]


def merged(width: int, norm: float | None = None, **options: Any) -> Fold:
    """Return a layer that is merged: new permutations each time."""
    layer = PoetLinear.from_linear(fresh(width), BLOCK_SIZE, seed=1, **options)

    def merge() -> None:
        for generators in layer.rotation_parameters():
            draw_(generators, norm)
        layer.merge_()

    return Fold(merge, layer._effective_weight, sum(p.nbytes for p in layer.weight.parameters()) / width**2)


def stepwise(width: int, norm: float | None = None, **options: Any) -> Fold:
    """Return a layer that is folded every step, and merged every 100th time."""
    rounded = options == {"storage": "bf16"}  # which settings refuse, for what is measured here
    options = {} if rounded else options
    layer = StepwiseLinear.from_settings(fresh(width), PoetSettings(BLOCK_SIZE, stepwise=True, **options), seed=1)
    if rounded:
        layer.weight = Bf16Weight(layer.weight.dequantize())

    def fold() -> None:
        for generators in layer.rotation_parameters():
            draw_(generators, norm)
        (layer.merge_ if int(layer.merge_count + layer.fold_count) % 100 == 99 else layer.fold_)()

    return Fold(fold, layer._effective_weight, sum(p.nbytes for p in layer.weight.parameters()) / width**2)


def naive(width: int) -> Fold:
    """Return the same for bf16 rotations R and a bf16 weight rounded to nearest."""
    weight = fresh(width).weight.detach().bfloat16()
    shape = (width // BLOCK_SIZE, BLOCK_SIZE * (BLOCK_SIZE - 1) // 2)

    def rotation() -> Tensor:
        draw_(generators := torch.empty(shape), None)
        return (Cayley().displacement(generators, BLOCK_SIZE) + torch.eye(BLOCK_SIZE)).bfloat16()

    def merge() -> None:
        nonlocal weight
        for _ in range(2):
            rows = weight[torch.randperm(width)].view(-1, BLOCK_SIZE, width)
            weight = torch.bmm(rotation().mT, rows).view(width, width).T.contiguous()

    return Fold(merge, lambda: weight.float(), 2.0)


DEFAULTS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16, stochastic rounding": {"storage": "bf16"},
    "bf16 + 8-bit residual": {"storage": "residual"},
    "int8, restored every 16 merges": {"storage": "int8"},
    "nf4, restored every 4 merges": {"storage": "nf4"},
}
OTHERS: dict[str, dict[str, Any]] = {
    "int8, restored every merge": {"storage": "int8", "anchor_every": 1},
    "int8, never restored": {"storage": "int8", "anchor_every": 0},
    "nf4, restored every merge": {"storage": "nf4", "anchor_every": 1},
    "nf4, never restored": {"storage": "nf4", "anchor_every": 0},
}
MAPS: dict[str, tuple[Parameterization, float]] = {
    "exact Cayley at 0.3": (Cayley(), 0.3),
    "exponential at 0.3": (Exponential(), 0.3),
    "Cayley-Neumann, order 4, at 0.04": (CayleyNeumann(4), 0.04),
    "Cayley-Neumann, order 4, at 0.3": (CayleyNeumann(4), 0.3),
    "Cayley-Neumann, order 4, at 0.537": (CayleyNeumann(4), 0.537),
    "Cayley-Neumann, order 2, at 0.025": (CayleyNeumann(2), 0.025),
}
Group = tuple[int, int, dict[str, Callable[[int], Fold]]]
GROUPS: dict[str, Group] = {
    "256 x 1000": (1000, 1, {
        **{name: lambda width, given=given: merged(width, **given) for name, given in (DEFAULTS | OTHERS).items()},
        "bf16, naive": naive,
    }),
    "1024 x 100": (100, 1, {
        name: lambda width, given=given: merged(width, **given) for name, given in DEFAULTS.items()
    }),
    "step-wise 256 x 10000": (10000, 7, {
        name: lambda width, given=given: stepwise(width, **given) for name, given in list(DEFAULTS.items())[:3]
    }),
    "parameterizations, 256 x 1000": (1000, 1, {
        name: lambda width, given=given: merged(width, given[1], parameterization=given[0])
        for name, given in MAPS.items()
    }),
}  # fmt: skip


def measure(run: Fold, width: int, merges: int, every: int) -> dict[str, float]:
    """Fold many times and compare the spectra on the way with the first one."""
    start = singular_values(run.weight())
    stored = spectral_drift(start, singular_values(fresh(width).weight))
    drifts, norms, seconds = [], [], []
    for count in range(1, merges + 1):
        begin = time.perf_counter()
        run.fold()
        seconds.append(time.perf_counter() - begin)
        if count % every == 0 or count == merges:
            now = singular_values(run.weight())
            drifts.append((spectral_drift(now, start), count, float((now - start).abs().mean() / start[0])))
            norms.append(float(now.norm() / start.norm()) - 1)
    largest, at, _ = max(drifts)
    mean = statistics.fmean(mean for *_, mean in drifts)
    return {"largest": largest, "at": at, "mean": mean, "norm": max(norms, key=abs), "stored": stored,
            "bytes": run.bytes, "seconds": statistics.median(seconds)}  # fmt: skip


@torch.no_grad()
def once() -> dict[str, float]:
    """Return what one merge of other parts does: the bias, the permutations, one rotation, and one in bf16."""
    linear = nn.Linear(256, 256)
    layer = PoetLinear.from_linear(linear, BLOCK_SIZE, seed=1)
    bias, weight = linear.bias.clone(), layer.merged_weight()
    layer.merge_()
    permuted = layer.merged_weight()
    draw_(layer.rotation_in.generators, 0.3)
    layer.merge_()
    found = {"bias": float((layer.bias - bias).abs().max()), "permutations": float((permuted - weight).abs().max())}
    eye = torch.eye(BLOCK_SIZE, dtype=torch.float64)
    for name, (parameterization, norm) in MAPS.items():
        draw_(generators := torch.empty(4, BLOCK_SIZE * (BLOCK_SIZE - 1) // 2, dtype=torch.float64), norm)
        exact = parameterization.displacement(generators, BLOCK_SIZE)
        rounded = parameterization.rounded_displacement(generators.float(), BLOCK_SIZE, torch.bfloat16)
        for kind, displacement in (("", exact), (" in bf16", rounded.double())):
            found[name + kind] = float((singular_values(eye + displacement) - 1).abs().max())
    return found


def main() -> None:
    """Print the drifts and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)}; all by default")
    torch.set_num_threads(1)
    document = json.loads(OUT.read_text()) if OUT.exists() else {}
    results = document.get("results", {}).get("folds", {})
    for group in parser.parse_args().groups or GROUPS:
        merges, every, cases = GROUPS[group]
        width = int(group.split(" x ")[0].split()[-1])
        results[group] = {}
        print(f"{group:<34}{'largest':>10}{'at':>7}{'mean':>10}{'norm':>10}{'stored':>10}{'bytes':>7}{'s/merge':>9}")
        for name, build in cases.items():
            torch.manual_seed(0)
            row = results[group][name] = measure(build(width), width, merges, every)
            print(f"{name:<34}{row['largest']:>10.1e}{row['at']:>7}{row['mean']:>10.1e}{row['norm']:>+10.1e}"
                  f"{row['stored']:>10.1e}{row['bytes']:>7.2f}{row['seconds']:>9.3f}", flush=True)  # fmt: skip
    torch.manual_seed(0)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    folds = {name: results[name] for name in GROUPS if name in results}
    OUT.write_text(json.dumps({"versions": versions, "results": {"folds": folds, "once": once()}}, indent=1) + "\n")


if __name__ == "__main__":
    main()
