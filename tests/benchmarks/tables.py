"""The tables of README.md and of the pages results, models and pretraining, made of the committed results.

    .venv/bin/python tests/benchmarks/tables.py            # prints every table
    .venv/bin/python tests/benchmarks/tables.py --write    # puts them into the pages, between their marks

A page marks the place of a table by ``<!-- table: NAME -->`` and ``<!-- end of table -->``.
tests/docs/test_tables.py compares the pages with the results.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", *(ROOT / f"docs/pages/{name}.md" for name in ("results", "models", "pretraining")))
PLACE = re.compile(r"(<!-- table: (.+?) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def results(name: str) -> Any:
    """Return the results of a benchmark, which lie in tests/benchmarks/results."""
    document = json.loads((ROOT / f"tests/benchmarks/results/{name}.json").read_text())
    return document.get("results", document)


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


TABLES: dict[str, Callable[[], str]] = {
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
    "spectrum": spectrum,
    "model types": model_types,
    "oft": partial(oft, "oft"),
    "oft, one thread": partial(oft, "oft_one_thread"),
}


def filled(page: str) -> str:
    """Return a page with every marked table as the results are now."""
    return PLACE.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}", page)


def main() -> None:
    """Print the tables, or write them into the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into the pages")
    if parser.parse_args().write:
        for page in PAGES:
            page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
        return
    for name, build in TABLES.items():
        print(f"{name}\n\n{build()}\n")


if __name__ == "__main__":
    main()
