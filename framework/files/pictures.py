"""Line plots for the run folder, drawn without a display."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from orthotrain.console.failures import naming
from orthotrain.files.atomic_writes import write_atomically

Series = Sequence[tuple[float, float]]


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure of a size in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def panels(titles: Sequence[str]) -> tuple[Any, list[Any]]:
    """Return a figure and its axes side by side, one for each title."""
    figure = new_figure(7 * len(titles), 4)
    axes = [figure.add_subplot(1, len(titles), number, title=title) for number, title in enumerate(titles, 1)]
    return figure, axes


def draw_lines(axes: Any, lines: Mapping[str, Iterable[tuple[float, float]]], **settings: Any) -> None:
    """Draw named series of points ``(x, y)`` with a legend.

    A series of fewer than 20 points gets markers, and an empty series is left out.

    Args:
        axes: Matplotlib axes.
        lines: Name -> points.
        settings: Passed to ``axes.set``: ``xlabel``, ``ylabel``, ``yscale``.
    """
    for name, points in lines.items():
        points = list(points)
        if points:
            axes.plot(*zip(*points, strict=True), label=name, marker="o" if len(points) < 20 else None, markersize=3)
    axes.set(**settings)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize="small")


def smoothed(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return a series in which each value is the mean of the values around it, over up to a tenth of the series.

    At the beginning, where a loss is steep, the window has as many values on the right as there are on the left, so
    that the line is not below or above the series. Values that are not finite are left out. A series of fewer than 20
    points is not changed.
    """
    finite = np.array([point for point in points if np.isfinite(point[1])], float).reshape(-1, 2)
    count = len(finite)
    places = np.arange(count)
    left = np.minimum(count // 20, places)
    right = np.minimum(left, count - 1 - places)
    sums = np.concatenate([[0.0], np.cumsum(finite[:, 1])])
    means = (sums[places + right + 1] - sums[places - left]) / (left + right + 1)
    return list(zip(finite[:, 0].tolist(), means.tolist(), strict=True))


def draw_curves(curves: Mapping[str, Series], path: Path, unit: str = "nats per token") -> Path:
    """Draw the curves of a run as one picture: losses on the left, learning rates and speed on the right.

    Args:
        curves: Name -> points ``(step, value)``. ``train_loss`` is drawn smoothed, with its points behind; ``val_loss``
            as a line with a marker for each validation. Names that begin with ``lr/`` are learning rates;
            ``tokens_per_second`` is the speed. Others are left out, and so is a panel without points.
        path: File to write.
        unit: Unit of the losses.

    Returns:
        The path.
    """
    rates = _without_repeats({name[3:]: points for name, points in curves.items() if name.startswith("lr/") and points})
    speed = curves.get("tokens_per_second", ())
    side = [name for name, points in (("learning rate", rates), ("tokens per second", speed)) if points]
    figure = new_figure(11 if side else 7.5, 4.5)
    places = [["loss", name] for name in side] or [["loss"]]
    axes = figure.subplot_mosaic(places, width_ratios=[2, 1][: len(places[0])])
    _draw_losses(axes["loss"], curves)
    axes["loss"].set(title="loss", xlabel="optimizer step", ylabel=unit)
    if rates:
        draw_lines(axes["learning rate"], rates, title="learning rate", ylim=(0, None))
        axes["learning rate"].ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    if speed:
        draw_smoothed(axes["tokens per second"], speed, "C2")
        axes["tokens per second"].set(title="tokens per second", ylim=(0, None))
        axes["tokens per second"].yaxis.set_major_formatter("{x:,.0f}")
    if side:
        axes[side[-1]].set(xlabel="optimizer step")
    return save(figure, path)


def _without_repeats(lines: Mapping[str, Series]) -> dict[str, Series]:
    """Return lines in which equal ones, of which one would hide the other, are one line with both names."""
    names: dict[tuple[tuple[float, float], ...], list[str]] = {}
    for name, points in lines.items():
        names.setdefault(tuple((x, y) for x, y in points), []).append(name)
    return {", ".join(same): points for points, same in names.items()}


def _draw_losses(axes: Any, curves: Mapping[str, Series]) -> None:
    train, val = curves.get("train_loss", ()), curves.get("val_loss", ())
    if train:
        draw_smoothed(axes, train, "C0", "training")
    if val:
        (first, *_, last) = [*val, val[-1]]
        change = f"{first[1]:.3f}" if len(val) == 1 else f"{first[1]:.3f} to {last[1]:.3f}"
        axes.plot(*zip(*val, strict=True), color="C1", marker="o", markersize=4, label=f"validation, {change}")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()


def draw_smoothed(axes: Any, points: Series, color: str, label: str | None = None) -> None:
    """Draw a smoothed series, with its own points as a faint line behind it."""
    axes.plot(*zip(*points, strict=True), color=color, alpha=0.3, linewidth=1)
    axes.plot(*zip(*smoothed(points), strict=True), color=color, linewidth=1.8, label=label)
    axes.grid(alpha=0.3)


def save(figure: Any, path: Path) -> Path:
    """Write the picture atomically and return its path."""
    with naming(path):
        write_atomically(path, lambda file: figure.savefig(file, dpi=120, format=path.suffix[1:]))
    return path
