"""Turns of the steps of LieOptimizer over the learning rate, and what its iteration costs.

    .venv/bin/python tests/benchmarks/angles.py [--checkpoint runs/quickstart/last.ckpt] [--quintics]

Blocks have random generators, singular values that fall to 10^-1 to 10^-4 of the largest in equal ratios, or are the
moments in the checkpoint of a step-wise run. Muon's iteration (five steps of one quintic after a division by the
Frobenius norm) runs on the same blocks. Results go to tests/benchmarks/results/angles.json. --quintics only derives
the coefficients of the steps and prints them.
"""

import argparse
import json
import math
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orthotrain.kernels.skew.cpu import skew_backward, skew_forward
from orthotrain.optimizers.orthogonalize import CUSHION, MARGIN, SMALLEST, orthogonalize

HERE = Path(__file__).parent
sys.path.append(str(HERE))  # at the end: no name there comes before that of a package

OUT = HERE / "results/angles.json"
NEGLIGIBLE, LR = 1e-3, 0.035
SIZES, SPECTRA = (8, 16, 32, 64, 128, 256, 512, 1024), ("random", 1, 2, 3, 4)

Quintic = tuple[float, float, float]


def minimax(low: float, high: float) -> tuple[Quintic, float]:
    """Return the a, b, c with the least ``max |1 - (a x + b x^3 + c x^5)|`` on [low, high], and this maximum.

    Remez exchange: three coefficients and the error follow from four points at which the error has alternating signs.
    The next points are the ends and the two places where the derivative is 0. At the optimum they stay where they are.
    """
    points = torch.linspace(low, high, 4, dtype=torch.float64)
    for _ in range(100):
        signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
        a, b, c, error = torch.linalg.solve(
            torch.stack([points, points**3, points**5, signs], 1), torch.ones(4, dtype=torch.float64)
        ).tolist()
        root = math.sqrt(9 * b * b - 20 * a * c)
        inner = [math.sqrt((-3 * b + sign * root) / (10 * c)) for sign in (-1, 1)]
        moved = torch.tensor([low, *inner, high], dtype=torch.float64)
        if torch.allclose(moved, points, rtol=1e-12, atol=0):
            break
        points = moved
    return (a, b, c), abs(error)


def quintics(smallest: float, cushion: float, margin: float, steps: int = 6) -> tuple[list[Quintic], float]:
    """Return the coefficients of the steps, and the largest distance from 1 that they leave on [smallest, 1]."""
    chosen, low, high = [], smallest, 1.0
    for _ in range(steps):
        high *= 1 + margin
        (a, b, c), error = minimax(max(low, cushion * high), high)
        chosen.append((a, b, c))
        low, high = min(a * low + b * low**3 + c * low**5, 1 - error), 1 + error
    return chosen, max(1 - low, high - 1)


def blocks(spectrum: str | int, count: int, size: int) -> Tensor:
    """Return generators of random blocks; a number gives the decades over which their singular values fall."""
    generator = torch.Generator().manual_seed(size)
    if spectrum == "random":
        return torch.randn(count, size * (size - 1) // 2, generator=generator)
    basis = torch.linalg.qr(torch.randn(count, size, size, generator=generator, dtype=torch.float64))[0]
    turning = torch.zeros(size, size, dtype=torch.float64)
    even = torch.arange(0, size - 1, 2)
    turning[even, even + 1] = torch.logspace(0, -float(spectrum), len(even), dtype=torch.float64)
    return skew_backward(basis @ (turning - turning.mT) @ basis.mT).float() / 2


def muons(generators: Tensor, size: int) -> Tensor:
    """Return the directions of Muon's iteration, in bf16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = skew_forward((generators / generators.norm(dim=1, keepdim=True)).bfloat16(), size)
    for _ in range(5):
        square = torch.bmm(x, x)
        x = torch.baddbmm(x, x, torch.baddbmm(square, square, square, beta=-b, alpha=c), beta=a)
    return skew_backward(x.float()) / 2


def measure(moments: Tensor, directions: Tensor, size: int) -> dict[str, float]:
    """Return the turns of a step over its rate: of the planes that count, and of all.

    A plane counts if its singular value in the moment is above 1e-3 of the largest. Where k count, the k largest
    singular values of the direction are taken for theirs.
    """
    before = torch.linalg.svdvals(skew_forward(moments.double(), size))
    counts = before > (1 + 1e-6) * NEGLIGIBLE * before[:, :1]
    # the first k of each block, because both are sorted; exact Cayley turns by 2 atan of a singular value of Q
    turns = 2 * torch.atan(LR / 2 * torch.linalg.svdvals(skew_forward(directions.double(), size))) / LR
    return {
        "negligible": float((~counts[:, : size - size % 2]).double().mean()),
        "smallest": float(turns[counts].min()),
        "mean": float(turns[counts].mean()),
        "largest": float(turns.max()),
        "mean of all": float(turns[:, : size - size % 2].mean()),
    }


def moments_of(checkpoint: Path) -> Iterator[tuple[str, int, Tensor]]:
    """Yield the moments of a step-wise run: its layers' blocks of one size in one batch, at most 64."""
    states = torch.load(checkpoint, map_location="cpu", weights_only=True)["optimizer_states"]
    by_width: dict[int, list[Tensor]] = {}
    for state in (state for whole in states for state in whole["state"].values() if "momentum" in state):
        by_width.setdefault(state["momentum"].shape[1], []).append(state["momentum"])
    for width, found in by_width.items():
        yield "moments of a run", (1 + math.isqrt(1 + 8 * width)) // 2, torch.cat(found)[:64]


def cost(size: int) -> dict[str, float]:
    """Return milliseconds of both iterations for blocks of a million entries, and their ratio."""
    from layers import interleaved

    moments = blocks("random", max(1, 2**20 // size**2), size)
    times = interleaved({"ours": lambda: orthogonalize(moments, size), "muon": lambda: muons(moments, size)}, 10)
    return {**times, "ratio": times["ours"] / times["muon"]}


def main() -> None:
    """Measure, or derive the coefficients."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--quintics", action="store_true")
    options = parser.parse_args()
    if options.quintics:
        chosen, error = quintics(SMALLEST, CUSHION, MARGIN)
        print(*(tuple(float(f"{value:.6g}") for value in step) for step in chosen), f"error {error:.4f}", sep="\n")
        return
    torch.set_num_threads(1)
    cases = [(s, b, blocks(s, max(1, min(64, 2048 // b)), b)) for s in SPECTRA for b in SIZES]
    cases += moments_of(options.checkpoint) if options.checkpoint else ()
    rows: list[dict[str, Any]] = []
    for name, size, moments in cases:
        found = {"ours": orthogonalize(moments, size), "muon": muons(moments, size)}
        rows.append({"moments": name, "size": size, **{k: measure(moments, x, size) for k, x in found.items()}})
        print(json.dumps(rows[-1]), flush=True)
    costs = {str(size): cost(size) for size in (64, 128, 256, 512)}
    ratio = max(found["ratio"] for found in costs.values())
    print(json.dumps(costs))
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    OUT.write_text(
        json.dumps({"versions": versions, "results": {"rows": rows, "cost": costs, "ratio": ratio}}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
