"""The tables of README.md, the manual and the pages of examples, made of the committed results.

    .venv/bin/python tests/benchmarks/tables.py      # prints every table

figures.py puts them into the pages.
"""

import json
import statistics
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from orthotrain.console.run_summary import summary_lines

HERE = Path(__file__).resolve().parent
PENDING = "*To be measured again.*"
"""Stands in the place of a table whose results are not committed yet."""


def results(name: str) -> Any:
    """Return the results of a benchmark, which lie in tests/benchmarks/results."""
    document = json.loads((HERE / f"results/{name}.json").read_text())
    return document.get("results", document)


def printed(text: str) -> str:
    """Return text that a program has printed, as a block."""
    lines = (line.rstrip() for line in text.rstrip().splitlines())
    return "\n".join(["```text", *lines, "```"])


def output(name: str) -> str:
    """Return the output of an example."""
    return printed((HERE / f"results/{name}.txt").read_text())


def kept_runs(*names: str) -> dict[str, Any]:
    """Return the summaries of runs that keep_run.py has kept.

    Raises:
        FileNotFoundError: If one of them has not been kept.
    """
    kept = results("runs")
    if missing := [name for name in names if name not in kept]:
        raise FileNotFoundError(f"results/runs.json has no {', '.join(missing)}")
    return {name: kept[name] for name in names}


def make_fit() -> str:
    """Return the summary of `make fit`, which `keep_run.py "make fit" runs/quickstart` has kept, and its machine."""
    run = kept_runs("make fit")["make fit"]
    summary = printed("\n".join(summary_lines(run, Path("runs/quickstart"))))
    return f"{summary}\n\nMeasured on {run['machine']}, with torch {run['torch']}."


def make_finetune() -> str:
    """Return the metrics of `make finetune` before and after, which keep_run.py has kept."""
    run = kept_runs("make finetune")["make finetune"]
    metrics = {"val_loss": "validation loss", "val_token_accuracy": "token accuracy", "val_rouge_l": "ROUGE-L"}
    rows = (
        [when, *(f"{run[key][metric]:.3f}" for metric in metrics)]
        for when, key in ((f"{run['steps']} steps", "after"), ("before", "before"))
    )
    return table(["", *metrics.values()], reversed(list(rows)))


def finetuning() -> str:
    """Return the runs of finetuning.py of the full length: means over the seeds."""
    rows = results("finetuning")
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["steps"] == max(row["steps"] for row in rows):
            found.setdefault(row["method"], []).append(row)
    cells = (
        [method, f"{runs[0]['lr']:g}", millions(runs[0]["trained"]), str(len(runs)),
         spread(runs, "val_loss"), spread(runs, "val_token_accuracy")]
        for method, runs in found.items()
    )  # fmt: skip
    return table(["method", "lr", "trained", "seeds", "validation loss", "token accuracy"], cells)


def precision(name: str, head: str, digits: str) -> str:
    """Return errors of one part of precision.py; columns that end with "kept" as shares."""
    found = results("precision")[name]
    columns = list(next(iter(found.values())))
    rows = (
        [row, *(f"{value:.0%}" if key.endswith("kept") else f"{value:{digits}}" for key, value in values.items())]
        for row, values in found.items()
    )
    return table([head, *columns], rows)


def faults() -> str:
    """Return which faults `make faults` has injected, and which runs have recovered."""
    rows = ([name, *map(str, found.values())] for name, found in results("faults").items())
    return table(["fault", "injected", "recovered", "most steps lost"], rows)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table in Markdown."""
    head = list(head)
    lines = [head, ["-"] * len(head), *rows]
    return "\n".join("|" + "|".join(line) + "|" if line == lines[1] else f"| {' | '.join(line)} |" for line in lines)


def millions(count: int) -> str:
    """Return a number of parameters such as ``2.70M``."""
    return f"{count / 1e6:.2f}M"


def quickstart() -> str:
    """400 steps of the quickstart's network; the test split only for the best rates of a method."""
    rows = (
        [row["method"], ", ".join(f"{name} {rate:g}" for name, rate in row["rates"].items()) or "of the config",
         *(f"{row[key]:.3f}" if key in row else "" for key in ("val_bits_per_byte", "test_bits_per_byte"))]
        for row in results("quickstart")
    )  # fmt: skip
    return table(["method", "learning rates", "validation", "test"], rows)


def chosen(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the row of each method that is the best on the validation split."""
    methods = dict.fromkeys(row["method"] for row in rows)
    return {m: min((r for r in rows if r["method"] == m), key=lambda r: r["val_bits_per_byte"]) for m in methods}


def quality(share: int) -> str:
    """Runs of the grid at one share of the full length: the mean over the seeds, validation."""
    rows = ([row["network"], row["name"], str(len(row["runs"])), spread(row["runs"], "bits_per_byte")]
            for row in settings(share))  # fmt: skip
    return table(["network", "setting", "seeds", "bits per byte"], rows)


def settings(share: int) -> list[dict[str, Any]]:
    """Return the settings of the grid at one share of the full length, each with its runs, best first.

    Raises:
        FileNotFoundError: If no run of this length has ended.
    """
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in results("quality"):
        if row["share"] == share:
            found.setdefault((row["network"], row["name"]), []).append(row)
    if not found:
        raise FileNotFoundError(f"results/quality.json has no run of 1/{share} of the length")
    rows = [{"network": network, "name": name, "runs": runs} for (network, name), runs in found.items()]
    return sorted(rows, key=lambda row: (row["network"], mean(row["runs"], "bits_per_byte")))


def mean(runs: list[dict[str, Any]], key: str) -> float:
    """Return the mean of a figure over runs."""
    return statistics.mean(run[key] for run in runs)


def spread(runs: list[dict[str, Any]], key: str) -> str:
    """Return mean and standard deviation of a figure over runs."""
    values = [run[key] for run in runs]
    return f"{mean(runs, key):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")


def best() -> str:
    """Return the best setting of each method at the full length of the smaller network, by validation."""
    first: dict[str, dict[str, Any]] = {}
    for row in settings(1):
        if row["network"] == "0.4M":
            first.setdefault(row["runs"][0]["setting"]["method"], row)
    speeds = results("quality_speed")
    rows = ([method, millions(row["runs"][0]["trained"]), f"{row['runs'][0]['state_bytes'] / 2**20:.1f} MiB",
             spread(row["runs"], "test_bits_per_byte"), f"{speeds[row['name']]['tokens_per_second']:,.0f}"]
            for method, row in first.items())  # fmt: skip
    return table(["method", "trained", "optimizer state", "test bits per byte", "tokens/s"], rows)


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
