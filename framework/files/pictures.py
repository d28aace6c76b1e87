"""Line plots for the run folder, drawn without a display."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from orthotrain.console.failures import naming
from orthotrain.files.atomic_writes import write_atomically

Series = Sequence[tuple[float, float]]


def panels(titles: Sequence[str]) -> tuple[Any, list[Any]]:
    """Return a figure and its axes side by side, one for each title."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7 * len(titles), 4), layout="constrained")
    FigureCanvasAgg(figure)
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


def save(figure: Any, path: Path) -> Path:
    """Write the picture atomically and return its path."""
    with naming(path):
        write_atomically(path, lambda file: figure.savefig(file, dpi=120, format=path.suffix[1:]))
    return path
