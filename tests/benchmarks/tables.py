"""The tables of README.md, the manual and the pages of examples, made of the committed results.

    .venv/bin/python tests/benchmarks/tables.py      # prints every table

figures.py puts them into the pages.
"""

import json
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
    return f"```text\n{text.rstrip()}\n```"


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
    lines = summary_lines(run, Path("runs/quickstart"))
    return f"{printed(chr(10).join(lines))}\n\nMeasured on {run['machine']}, with torch {run['torch']}."


def finetuning() -> str:
    """Return metrics of kept runs before and after finetuning."""
    metrics = {"val_loss": "validation loss", "val_token_accuracy": "token accuracy", "val_rouge_l": "ROUGE-L"}
    rows = (
        [name, str(run["steps"]), *(f"{run['before'][key]:.3f} to {run['after'][key]:.3f}" for key in metrics)]
        for name, run in kept_runs("make finetune", "SmolLM2-135M, OFT", "SmolLM2-135M, QOFT over NF4").items()
    )
    return table(["run", "steps", *metrics.values()], rows)


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
    """400 steps of the quickstart's network."""
    rows = ([name, f"{found['val_bits_per_byte']:.3f}"] for name, found in results("quickstart").items())
    return table(["run", "bits per byte"], rows)


def quality_row(row: dict[str, Any]) -> list[str]:
    """Return a run of the quality benchmark as cells: name, trained parameters, seeds, bits per byte."""
    spread = "" if row["spread"] is None else f" ± {row['spread']:.3f}"
    trained = millions(row["runs"][0]["trained"])
    return [row["name"], trained, str(row["seeds"]), f"{row['bits_per_byte']:.3f}{spread}"]


def quality(*groups: str, name: str = "quality") -> str:
    """Runs of equal tokens, in the order of the groups; all of them where no group is named."""
    found = [row for row in results(name) if not groups or row["group"] in groups]
    rows = map(quality_row, sorted(found, key=lambda row: groups.index(row["group"]) if groups else 0))
    return table(["run", "trained", "seeds", "bits per byte"], rows)


BEST = (
    "AdamW, hidden lr 0.00025",
    "POET-BS b=64, lr 0.002",
    "AdamW, hidden lr 2.5e-4, embeddings and head 8e-3",
    "LoRA r=64, lr 0.001",
    "Muon, hidden lr 0.01, embeddings and head 0.008",
    "step-wise b=256, the rest 0.008, trained scale",
)
"""Runs of the README's table: the best rate of each method."""


def best() -> str:
    """Return the best run of each method."""
    rows = {row["name"]: quality_row(row) for row in results("quality")}
    return table(["run", "trained", "seeds", "bits per byte"], (rows[name] for name in BEST))


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
    """Drift of singular values over many merges."""
    rows = [
        [runs, storage, f"{row['bytes']:.2f}", *(f"{row[name]:.1e}" for name in ("largest", "mean", "norm"))]
        for runs, storages in results("folding").items()
        for storage, row in storages.items()
    ]
    return table(["width x merges", "storage", "bytes", "largest drift", "mean drift", "Frobenius norm"], rows)


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
    "finetuning": finetuning,
    "faults": faults,
    "16 bits": partial(precision, "16 bits", "generators", ".2g"),
    "rounded displacement": partial(precision, "rounded displacement", "powers", ".1e"),
    "tf32 products": partial(precision, "tf32 products", "norm of $Q$", ".0e"),
    "best": best,
    "quickstart": quickstart,
    "baselines": partial(quality, "baselines"),
    "poet": partial(quality, "poet", "period", "order", "parameterization", "init", "groups of 8 features permuted"),
    "stepwise": partial(quality, "stepwise"),
    "scale": partial(quality, "scale"),
    "recipe": partial(quality, "recipe"),
    "guard": partial(quality, "guard"),
    "long": partial(quality, name="quality_400"),
    "layers": layers,
    "steps": steps,
    "starting": starting,
    "loss": loss,
    "folding": folding,
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
