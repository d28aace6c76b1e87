"""The tables of training runs: the quickstart, finetuning, and the methods at 20 tokens for each parameter."""

from pathlib import Path
from typing import Any

from table_parts import mean, millions, printed, results, spread, table

from orthotrain.console.run_summary import summary_lines


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
