"""The text of the summary at the end of a run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orthotrain.console.progress import duration
from orthotrain.errors import escaped


@dataclass(frozen=True)
class References:
    """Results of other methods on the network of a config, for a run of the same length on the same text.

    Args:
        tokens: Tokens that each of them was trained on.
        source: ``source`` of the data.
        bits_per_byte: Name of a method -> its final ``val_bits_per_byte`` on the whole validation split.
    """

    tokens: int
    source: str
    bits_per_byte: dict[str, float]


def summary_lines(values: dict[str, Any], folder: Path) -> list[str]:
    """Return the lines of a summary, without those of which a run has no value.

    Args:
        values: The values of ``summary.json``.
        folder: Folder of the run.
    """
    rows = [("optimizer steps", str(values["steps"]))]
    for key, after in values["after"].items():
        before = f"{values['before'][key]:.3f} -> " if key in values["before"] else ""
        rows.append((f"validation {metric_name(key)}", f"{before}{after:.3f}"))
        if key == "val_bits_per_byte" and values["references"]:
            others = ", ".join(f"{name} {value:.3f}" for name, value in values["references"].items())
            rows.append(("  at the same tokens", others))
    rows += [(f"{split} data", amount_text(amount)) for split, amount in values["data"].items()]
    if values["tokens"]:
        rows.append(("tokens trained", f"{values['tokens']:,}"))
    if values["tokens_per_second"] is not None:
        rows.append(("tokens per second", f"{values['tokens_per_second']:,.0f}"))
    rows.append(("wall time", duration(values["wall_seconds"])))
    names = {"memory": "peak memory", "next_token_loss": "next-token loss"}
    for key in ("memory", "next_token_loss", "kernels"):
        if values[key] is not None:
            rows.append((names.get(key, key.replace("_", " ")), values[key]))
    rows.append(("parameters", f"{values['trainable_parameters']:,} trained of {values['total_parameters']:,}"))
    early = values["early_folds"]
    if values["merges"] is not None or early is not None:
        # a run shorter than a period may have folded single layers only
        folds = "" if early is None else f", and {early} early folds of single layers"
        rows.append(("merges", f"{values['merges'] or 0}{folds}"))
    if values["spectrum_drift"] is not None:
        watched, layers = len(values["spectrum_layers"]), values["mergeable_layers"]
        which = f"all {layers}" if watched == layers else f"{watched} of {layers}"
        drift = f"{values['spectrum_drift']:.1e} of the largest singular value"
        rows.append(("spectrum drift", f"{drift} ({which} rotated layers)"))
    rows.append(("curves", str(folder / "curves.png")))
    rows.append(("checkpoint", values["checkpoint"] or "none was written"))
    rows.append(("run folder", str(folder)))
    return [f"{name:<26}{value}" for name, value in rows]


def metric_name(name: str) -> str:
    """Return the name of a validation metric for people."""
    return name.removeprefix("val_").replace("_", " ")


def amount_text(amount: dict[str, int]) -> str:
    """Return an amount of data as text: ``{"rows": 590, "tokens": 3000}`` gives ``590 rows, 3,000 tokens``."""
    return ", ".join(f"{count:,} {unit}" for unit, count in amount.items())


def sample_lines(prompt: str, continuation: str) -> list[str]:
    """Return the lines of a sample: the prompt, and what the network has written."""
    return [
        *("prompt", *("  " + escaped(line) for line in prompt.splitlines())),
        *("sample", *("  " + escaped(line) for line in continuation.splitlines())),
    ]
