"""Plots of a report: learning curves, accuracy against the cost of training, speed."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.report.runs import Run

COLUMNS = 2


def draw_curves(runs: Sequence[Run], path: Path) -> None:
    """Draws the validation metric against epochs, one panel per task."""

    def draw(axes: Axes, run: Run) -> None:
        points = [(epoch, value) for epoch, value, _ in run.curve]
        axes.plot(*zip(*points), marker="o", markersize=3, label=run.name)

    _draw(runs, path, draw, "epoch")


def draw_cost(runs: Sequence[Run], path: Path) -> None:
    """Draws the best validation metric so far against the seconds of training, one panel per task."""

    def draw(axes: Axes, run: Run) -> None:
        points, best = [], -math.inf
        for _, value, seconds in run.curve:
            best = max(best, value)
            if math.isfinite(seconds) and seconds > 0:
                points.append((seconds, best))
        if points:
            axes.plot(*zip(*points), marker="o", markersize=3, label=run.name)
            axes.set_xscale("log")

    _draw([run for run in runs if run.metric == "accuracy"], path, draw, "seconds of training", best=True)


def _draw(
    runs: Sequence[Run], path: Path, draw: Callable[[Axes, Run], None], xlabel: str, *, best: bool = False
) -> None:
    runs = [run for run in runs if run.curve]
    panels = list(dict.fromkeys((run.task, run.metric) for run in runs)) or [("no evaluation", "")]
    height = math.ceil(len(panels) / COLUMNS)
    figure = Figure(figsize=(6 * min(COLUMNS, len(panels)), 3.6 * height), layout="constrained")
    found = figure.subplots(height, min(COLUMNS, len(panels)), squeeze=False).ravel()
    for axes, (task, metric) in zip(found, panels):
        for run in runs:
            if (run.task, run.metric) == (task, metric):
                draw(axes, run)
        axes.set(title=task, xlabel=xlabel, ylabel=f"{'best ' if best else ''}validation {metric}")
        axes.title.set_fontsize(10)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    for axes in found[len(panels) :]:
        axes.set_axis_off()
    FigureCanvasAgg(figure).print_png(path)


def draw_speed(runs: Sequence[Run], path: Path) -> None:
    """Draws the real tokens per second of the finished runs."""
    speeds = {
        f"{run.name}: {run.task}": run.results["tokens_per_second"] for run in runs if run.results is not None
    }
    figure = Figure(figsize=(8, 1 + 0.35 * max(1, len(speeds))), layout="constrained")
    axes = figure.subplots()
    axes.barh(list(speeds), list(speeds.values()))
    axes.invert_yaxis()
    axes.set(xlabel="real tokens per second in training")
    axes.grid(alpha=0.3, axis="x")
    FigureCanvasAgg(figure).print_png(path)
