"""Parts of the tables of tables.py: results of benchmarks, and Markdown."""

import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def results(name: str) -> Any:
    """Return the results of a benchmark, which lie in tests/benchmarks/results."""
    document = json.loads((HERE / f"results/{name}.json").read_text())
    return document.get("results", document)


def printed(text: str) -> str:
    """Return text that a program has printed, as a block."""
    lines = (line.rstrip() for line in text.rstrip().splitlines())
    return "\n".join(["```text", *lines, "```"])


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table in Markdown."""
    head = list(head)
    lines = [head, ["-"] * len(head), *rows]
    return "\n".join("|" + "|".join(line) + "|" if line == lines[1] else f"| {' | '.join(line)} |" for line in lines)


def millions(count: int) -> str:
    """Return a number of parameters such as ``2.70M``."""
    return f"{count / 1e6:.2f}M"


def mean(runs: list[dict[str, Any]], key: str) -> float:
    """Return the mean of a figure over runs."""
    return statistics.mean(run[key] for run in runs)


def spread(runs: list[dict[str, Any]], key: str) -> str:
    """Return mean and standard deviation of a figure over runs."""
    values = [run[key] for run in runs]
    return f"{mean(runs, key):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")
