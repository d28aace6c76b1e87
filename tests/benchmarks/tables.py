"""The tables of README.md, the manual and the pages of examples, made of the committed results.

    .venv/bin/python tests/benchmarks/tables.py      # prints every table

figures.py puts them into the pages.
"""

import json
from collections.abc import Callable
from functools import partial
from typing import Any

from table_parts import HERE, printed, results, table
from training_tables import best, finetuning, make_finetune, make_fit, quality, quickstart

PENDING = "*To be measured again.*"
"""Stands in the place of a table whose results are not committed yet."""


def output(name: str) -> str:
    """Return the output of an example."""
    return printed((HERE / f"results/{name}.txt").read_text())


def precision(name: str, head: str, digits: str) -> str:
    """Return errors of one part of precision.py; columns that end with "kept" as shares."""
    found = results("precision")[name]
    columns = list(next(iter(found.values())))
    rows = (
        [row, *(f"{value:.0%}" if key.endswith("kept") else f"{value:{digits}}" for key, value in values.items())]
        for row, values in found.items()
    )
    return table([head, *columns], rows)


def angles() -> str:
    """Return turns of steps over the learning rate, for some of the sizes of angles.py."""
    rows = []
    for row in (row for row in results("angles")["rows"] if row["size"] in (8, 64, 256, 1024)):
        name = row["moments"] if isinstance(row["moments"], str) else f"falling to 10^-{row['moments']}"
        turns = [f"{x['smallest']:.3f} to {x['largest']:.3f}, mean {x['mean']:.3f}" for x in (row["ours"], row["muon"])]
        share, average = f"{100 * row['ours']['negligible']:.1f}%", f"{row['ours']['mean of all']:.3f}"
        rows.append([name, str(row["size"]), share, average, *turns])
    return table(["moments", "b", "negligible", "mean of all", "of the others", "Muon's iteration"], rows)


def faults() -> str:
    """Return which faults `make faults` has injected, and which runs have recovered."""
    rows = ([name, *map(str, found.values())] for name, found in results("faults").items())
    return table(["fault", "injected", "recovered", "most steps lost"], rows)


def layers() -> str:
    """Time of a layer over that of a trained nn.Linear."""
    ours, epyc, stepwise = results("kernels_cpu"), results("kernels_cpu_epyc"), results("stepwise")["layers"]
    shapes = [name.split()[1] for name in ours if name.endswith("float32")]
    order = sorted(shapes, key=lambda shape: [int(part) for part in shape.split("/")])

    def cells(found: Any, shape: str, prefix: str, route: str = "auto") -> list[str]:
        return [f"{found[f'{prefix}{shape} {dtype}']['ratio'][route]:.2f}" for dtype in ("float32", "bfloat16")]

    rows = (
        [shape.replace("/", " / "), *cells(ours, shape, "cpu "), *cells(epyc, shape, "cpu "),
         *cells(stepwise, shape, ""), *cells(ours, shape, "cpu ", "frozen")]
        for shape in order
    )  # fmt: skip
    kinds = ("POET, AMX", "POET, EPYC", "step-wise, AMX", "two frozen products, AMX")
    return table(["d / N / b", *(f"{kind}, {dtype}" for kind in kinds for dtype in ("fp32", "bf16"))], rows)


def steps() -> str:
    """Whole training steps."""
    found = results("stepwise")["steps"]
    rows = (
        [name, f"{row['ms']:.0f}", f"{row['ms'] / found['AdamW']['ms']:.2f}", f"{row['tokens_per_s']:,.0f}",
         f"{row['peak_mib']:.0f}", f"{row['state_mib']:.1f}"]
        for name, row in found.items()
    )  # fmt: skip
    return table(["run", "ms", "of AdamW's", "tokens/s", "peak, MiB", "optimizer state, MiB"], rows)


def starting() -> str:
    """Start of an 8B network."""
    rows = (
        [name, f"{row['seconds']:.0f}", f"{row['weights_gib']:.2f}", f"{row['peak_gib']:.2f}"]
        for name, row in results("starting").items()
    )
    return table(["storage and init", "seconds", "weights, GiB", "peak, GiB"], rows)


def loss() -> str:
    """Peak memory of the next-token loss."""
    found = {(row["loss_by"], row["dtype"], row["head"]): str(row["peak_mib"]) for row in results("loss")["rows"]}
    columns = [(dtype, head) for dtype in ("bfloat16", "float32") for head in ("frozen", "trained")]
    ways = dict.fromkeys(way for way, _, _ in found)
    rows = ([way, *(found[(way, *column)] for column in columns)] for way in ways)
    return table(["loss by", *(f"{dtype}, head {head}" for dtype, head in columns)], rows)


def folding() -> str:
    """Drift of singular values over many merges: the largest of the whole run."""
    rows = [
        [runs, storage, f"{row['bytes']:.2f}", f"{row['largest']:.1e}", str(row["at"]),
         *(f"{row[name]:.1e}" for name in ("mean", "norm", "stored"))]
        for runs, storages in results("folding")["folds"].items() if not runs.startswith("parameterizations")
        for storage, row in storages.items()
    ]  # fmt: skip
    head = ("width x merges", "storage", "bytes", "largest drift", "at merge", "mean drift", "Frobenius norm")
    return table([*head, "first storing"], rows)


KEPT = {
    "bias": ("the bias, which is added after the rotations", "exactly"),
    "permutations": ("new permutations", "exactly"),
    "exact Cayley at 0.3": ("`cayley`, norm 0.3", "to rounding"),
    "exponential at 0.3": ("`exponential`, norm 0.3", "to rounding"),
    "Cayley-Neumann, order 4, at 0.04": ("`cayley_neumann` of order 4, norm 0.04", "nearly"),
    "Cayley-Neumann, order 4, at 0.3": ("`cayley_neumann` of order 4, norm 0.3", "nearly"),
    "Cayley-Neumann, order 4, at 0.537": ("`cayley_neumann` of order 4, norm 0.537", "nearly"),
    "Cayley-Neumann, order 2, at 0.025": ("`cayley_neumann` of order 2, norm 0.025", "nearly"),
    "Cayley-Neumann, order 4, at 0.04 in bf16": ("its forward pass in bf16, order 4, norm 0.04", "nearly"),
    "Cayley-Neumann, order 4, at 0.3 in bf16": ("its forward pass in bf16, order 4, norm 0.3", "nearly"),
    "fp32": ("weight in fp32", "to rounding"),
    "bf16 + 8-bit residual": ("`storage: residual`", "nearly"),
    "bf16, stochastic rounding": ("weight in bf16", "nearly"),
    "int8, restored every 16 merges": ("`storage: int8`", "nearly"),
    "nf4, restored every 4 merges": ("`storage: nf4`", "nearly"),
}
"""Parts of a run in results/folding.json: name in the table, and how they keep the singular values."""


def spectrum() -> str:
    """Which parts keep the singular values exactly, and which within what."""
    found = results("folding")
    runs = {name: row for group, rows in found["folds"].items() if group.endswith("256 x 1000")
            for name, row in rows.items()}  # fmt: skip
    stepwise = found["folds"]["step-wise 256 x 10000"]

    def cell(value: float | None) -> str:
        return "" if value is None else f"{value:.1e}" if value else "0"

    rows = []
    for key, (part, kept) in KEPT.items():
        once = found["once"][key] if key in found["once"] else runs[key]["stored"]
        many = [group[key]["largest"] if key in group else None for group in (runs, stepwise)]
        rows.append([part, kept, *map(cell, (once, *many))])
    return table(["part", "keeps the singular values", "once", "1,000 merges", "10,000 steps"], rows)


def oft(name: str) -> str:
    """OFT beside PEFT."""
    rows = (
        [f"{kind}, {'fp32' if dtype.endswith('32') else 'bf16'}", f"{row['ms']:.1f}", f"{row['step_ms']:.1f}",
         f"{row['saved_mib']:.1f}", f"{row['peak_mib']:.0f}"]
        for dtype, kinds in results(name).items()
        for kind, row in kinds.items()
    )  # fmt: skip
    return table(["network", "forward and backward, ms", "step, ms", "saved, MiB", "peak, MiB"], rows)


def of_model_type(found: dict[str, Any]) -> str:
    """Return what a method does with a model type: passes, with which options, or the message that refuses it."""
    if found["result"] != "passes":
        return f"{found['result']}: {found['message']}".replace("|", "\\|")
    settings = {**found["followed"], **found["followed"].get("config", {})}
    settings.pop("config", None)
    added = [f"`{key}: {json.dumps(value)}`" for key, value in settings.items()]
    notes = ["experts are not rotated"] * ("experts" in found) + ["PEFT cannot run the adapter"] * ("peft" in found)
    return "; ".join(["passes" + (f" with {' and '.join(added)}" if added else ""), *notes])


def model_types() -> str:
    """Which model types of transformers pass."""
    methods = ("POET", "OFT")
    rows = ([name, *(of_model_type(row[method]) for method in methods)] for name, row in results("model_types").items())
    return table(["model type", *methods], rows)


EXAMPLES = ("conv_oft", "custom_network", "parameterization_plugin", "prior_fitted_network", "representation_defense")
TABLES: dict[str, Callable[[], str]] = {
    **{name: partial(output, name) for name in EXAMPLES},
    "make fit": make_fit,
    "make finetune": make_finetune,
    "finetuning": finetuning,
    "faults": faults,
    "angles": angles,
    "16 bits": partial(precision, "16 bits", "generators", ".2g"),
    "rounded displacement": partial(precision, "rounded displacement", "powers", ".1e"),
    "tf32 products": partial(precision, "tf32 products", "norm of $Q$", ".0e"),
    "best": best,
    "quickstart": quickstart,
    **{f"grid, 1/{share}": partial(quality, share) for share in (8, 4, 2, 1)},
    "layers": layers,
    "steps": steps,
    "starting": starting,
    "loss": loss,
    "folding": folding,
    "spectrum": spectrum,
    "model types": model_types,
    "oft": partial(oft, "oft"),
    "oft, one thread": partial(oft, "oft_one_thread"),
}


def built(name: str) -> str:
    """Return a table, or :data:`PENDING` if its results are not committed yet."""
    try:
        return TABLES[name]()
    except FileNotFoundError:
        return PENDING


if __name__ == "__main__":
    print("\n\n".join(f"{name}\n\n{built(name)}" for name in TABLES))
