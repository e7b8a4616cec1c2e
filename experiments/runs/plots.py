"""Curves of runs as PNG."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Lines = Sequence[Mapping[str, Any]]


def draw_curves(
    runs: Mapping[str, Lines], path: Path, *, metric: str, baselines: Mapping[str, float] | None = None
) -> None:
    """Draws training loss and a validation metric against steps, with one color per run.

    Args:
      runs: lines of each run's log (see `logs.read_lines`), by displayed name.
      metric: validation metric to draw, such as "accuracy".
      baselines: values of that metric to draw as horizontal lines, by name.

    Values that are missing or null, because they were not finite, are left out.
    """
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, (name, lines) in enumerate(runs.items()):
        for axes, kind, field, marker in ((left, "train", "loss", ""), (right, "validation", metric, "o")):
            points = [(line["step"], line.get(field)) for line in lines if line["kind"] == kind]
            points = [(step, value) for step, value in points if value is not None]
            axes.plot(*zip(*points), marker=marker, markersize=3, color=f"C{number}", label=name)
    known = {name: value for name, value in (baselines or {}).items() if value is not None}
    for number, (name, value) in enumerate(known.items()):
        style = ("--", ":", "-.")[number % 3]
        right.axhline(value, color="0.4", linestyle=style, linewidth=1, label=name.replace("_", " "))
    left.set(xlabel="step", ylabel="training loss")
    right.set(xlabel="step", ylabel=f"validation {metric}")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    FigureCanvasAgg(figure).print_png(path)
