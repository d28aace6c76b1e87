"""``orthotrain compare RUN RUN ...``: a table and a picture of several runs, and in what they are not comparable."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orthotrain.checkpoints.stored_values import stored_count, stored_curves, stored_numbers
from orthotrain.cli.config_files import read_config
from orthotrain.console.progress import duration
from orthotrain.console.run_summary import metric_name
from orthotrain.errors import ConfigurationError, escaped
from orthotrain.files.paths import local_path, read_json
from orthotrain.files.pictures import new_figure, save, smoothed

NOT_DATA = {"batch_size", "num_workers", "cache_dir", "predict_prompts", "allow_changed", "generation_samples"}
"""Arguments of a data module that change neither the text that is trained on nor the text that is evaluated."""
EVALUATION = ("limit_val_batches", "precision")
"""Options of the trainer that change the validation loss of the same weights."""
TOLERANCE = 0.01
"""Largest relative difference of the tokens of comparable runs."""


@dataclass
class Run:
    """What the folder of a run says about it.

    Args:
        name: Name in the table.
        summary: Contents of ``summary.json``.
        config: Contents of ``config.yaml``; empty if there is none, or if it is not the one of the summary.
    """

    name: str
    summary: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: str) -> "Run":
        """Read the folder of a run.

        Raises:
            ConfigurationError: The folder has no summary of a run, or one of its files is damaged.
        """
        path = local_path(folder, "RUN")
        if not (path / "summary.json").exists():
            raise ConfigurationError(f"{folder!r} has no summary.json: give the folder of a run whose fit has ended")
        summary = read_json(path / "summary.json", "summary")
        try:
            stored_count(summary, "steps"), stored_numbers(summary, "after"), stored_curves(summary, "curves")
        except (AttributeError, TypeError, KeyError) as error:
            raise ConfigurationError(f"{str(path / 'summary.json')!r} is no summary of a run: {error!r}") from error
        written, digest = path / "config.yaml", summary.get("config_sha256")
        config = read_config(written) if written.exists() else {}
        if "config_sha256" in summary and config and hashlib.sha256(written.read_bytes()).hexdigest() != digest:
            config = {}  # another fit in the folder has begun since, or the file was edited
        return cls(str(folder).rstrip("/"), summary, config)

    def number(self, key: str) -> float | None:
        """Return a number of the summary; None if the run has none."""
        value = self.summary.get(key)
        return value if isinstance(value, int | float) and not isinstance(value, bool) else None

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of data and evaluation by name."""
        data, trainer = _table(self.config, "data"), _table(self.config, "trainer")
        found = {name: value for name, value in trainer.items() if name in EVALUATION}
        arguments = _table(data, "init_args")
        found |= {f"data.{name}": value for name, value in arguments.items() if name not in NOT_DATA}
        if found.get("limit_val_batches") not in (None, 1.0):  # so many batches of another size are other text
            found["data.batch_size"] = arguments.get("batch_size")
        return {"data": data.get("class_path"), **found, "seed_everything": self.config.get("seed_everything")}


def table(runs: list[Run]) -> str:
    """Return the figures of the runs as text, one line for each figure and one column for each run."""
    metrics = list(dict.fromkeys(name for run in runs for name in run.summary["after"]))
    rows: list[tuple[str, list[str]]] = [("", [run.name for run in runs])]
    rows.append(("optimizer steps", [f"{run.summary['steps']:,}" for run in runs]))
    rows.append(("tokens trained", [_text(run.number("tokens"), ",.0f") for run in runs]))
    for name in metrics:
        rows.append((f"validation {metric_name(name)}", [_text(run.summary["after"].get(name), ".4f") for run in runs]))
    counts = ("trainable_parameters", "total_parameters", "tokens_per_second")
    rows += [(key.replace("_", " "), [_text(run.number(key), ",.0f") for run in runs]) for key in counts]
    peaks = [run.number("peak_memory_bytes") for run in runs]
    rows.append(("peak memory, GiB", [_text(peak and peak / 2**30, ".2f") for peak in peaks]))
    rows.append(("wall time", ["-" if (s := run.number("wall_seconds")) is None else duration(s) for run in runs]))
    widths = [max(len(row[1][n]) for row in rows) + 2 for n in range(len(runs))]
    lines = ("".join([f"{name:<24}", *(f"{v:>{w}}" for v, w in zip(vs, widths, strict=True))]) for name, vs in rows)
    return "\n".join(map(escaped, lines))


def warnings_of(runs: list[Run]) -> list[str]:
    """Return a line for each difference that makes the losses of the runs not comparable."""
    tokens = [run.number("tokens") for run in runs]
    found = []
    if None in tokens:
        found.append("a run has no count of tokens: compare its config with the others'")
    else:
        known = [count for count in tokens if count is not None]
        if max(known) > min(known) * (1 + TOLERANCE):
            found.append(f"the runs were trained on different numbers of tokens: {_each(runs, tokens)}")
    settings = [run.settings for run in runs]
    for name in dict.fromkeys(key for each in settings for key in each):
        values = [each.get(name) for each in settings]
        if any(value != values[0] for value in values):
            found.append(f"the runs differ in {name}: {_each(runs, values)}")
    for split in ("train", "val"):
        digests = [_table(run.summary, "data_digests").get(split) for run in runs]
        if len(set(map(str, filter(None, digests)))) > 1:
            found.append(f"the runs differ in the content of the {split} data: {_each(runs, digests, 12)}")
    if without := [run.name for run in runs if not run.config]:
        what = "no config.yaml, or another than that of the summary, in"
        found.append(f"{what} {', '.join(without)}: data and evaluation settings cannot be compared")
    return [escaped(line) for line in found]


def draw(runs: list[Run], path: Path) -> Path:
    """Draw the losses of the runs over tokens, or over steps if a run has no count of tokens; return the path."""
    by_tokens = all(run.number("tokens") and run.summary["steps"] for run in runs)
    figure = new_figure(9, 5)
    axes = figure.add_subplot(1, 1, 1)
    for number, run in enumerate(runs):
        scale = (run.number("tokens") or 0) / run.summary["steps"] if by_tokens else 1
        curves, color = run.summary["curves"], f"C{number}"
        train = [(step * scale, value) for step, value in smoothed(curves.get("train_loss", []))]
        val = [(step * scale, value) for step, value in curves.get("val_loss", [])]
        if train:
            axes.plot(*zip(*train, strict=True), color=color, alpha=0.4, linewidth=1, label=None if val else run.name)
        if val:
            axes.plot(*zip(*val, strict=True), color=color, marker="o", markersize=4, label=run.name)
    title = "validation loss (points) and smoothed training loss"
    axes.set(xlabel="tokens" if by_tokens else "optimizer step", ylabel="loss", title=title)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    return save(figure, path)


def _table(config: dict[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key)
    return value if isinstance(value, dict) else {}


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _each(runs: list[Run], values: list[Any], most: int = 60) -> str:
    return ", ".join(f"{run.name} {value!s:.{most}}" for run, value in zip(runs, values, strict=True))
