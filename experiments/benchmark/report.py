"""The results of a study as a table and as a plot."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Row = Mapping[str, Any]
COLOURS = mpl.colormaps["tab20"].colors[::2] + mpl.colormaps["tab20"].colors[1::2]

HEADER = (
    f"{'':58}  {'forward':>9}  {'x floor':>7}  {'x ours':>6}  {'GB':>6}  "
    f"{'both':>9}  {'x floor':>7}  {'x ours':>6}  {'GB':>6}  {'error':>7}  {'of grad':>7}"
)


def line(row: Row) -> str:
    """Returns one row as text: milliseconds forward, and forward with backward, floors, memory and errors."""
    label = _label(row)
    if "problem" in row:
        return f"{label:58}  {row['problem']}"
    parts = (
        f"{row[f'{part}_ms']:9.3f}  {row[f'{part}_over_floor']:7.1f}  "
        f"{row.get(f'{part}_over_default', float('nan')):6.2f}  "
        f"{row[f'{part}_peak_bytes'] / 1e9:6.2f}"
        for part in ("forward", "both")
    )
    return f"{label:58}  {'  '.join(parts)}  {row['error']:7.1e}  {row['gradient_error']:7.1e}"


def _label(row: Row) -> str:
    chosen = ", our choice" if row["default"] else ""
    return f"{row['primitive']}: {row['case']}, {row['implementation']}{chosen}"


def draw_bars(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draws milliseconds of forward and backward as bars, with a black mark at the floor of each."""
    rows = [row for row in rows if "both_ms" in row]
    figure = Figure(figsize=(10, 1 + 0.22 * len(rows)), layout="constrained")
    axes = figure.subplots()
    heights = range(len(rows))
    colours = ["C0" if row["default"] else "C7" for row in rows]
    axes.barh(heights, [row["both_ms"] for row in rows], color=colours, alpha=0.6, label="both passes")
    axes.barh(heights, [row["forward_ms"] for row in rows], color=colours, label="forward")
    axes.plot([row["both_floor_ms"] for row in rows], heights, "k|", markersize=9, label="floor of both")
    axes.set_yticks(heights, [_label(row) for row in rows])
    axes.tick_params(axis="y", labelsize=7)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="milliseconds", title=title)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=7)
    FigureCanvasAgg(figure).print_png(path)


def draw_scaling(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draws time and memory of both passes against the length, one line per primitive; dashes show linear growth."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    for axes, field, label in zip(
        figure.subplots(1, 2),
        ("both_ms", "both_peak_bytes"),
        ("milliseconds, both passes", "peak memory in bytes"),
        strict=True,
    ):
        names = dict.fromkeys((row["primitive"], row["case"]) for row in rows)
        axes.set_prop_cycle(color=COLOURS)
        for number, name in enumerate(names):
            points = [
                (row["time"], row[field])
                for row in rows
                if (row["primitive"], row["case"]) == name and field in row
            ]
            if points:
                marker = "os^vDPX*"[number % 8]
                axes.plot(*zip(*points), marker=marker, markersize=4, label=": ".join(name))
        lengths = sorted({row["time"] for row in rows})
        lowest = min(row[field] for row in rows if field in row)
        axes.plot(
            lengths, [lowest / 2 * length / lengths[0] for length in lengths], "k--", label="proportional"
        )
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=label)
        axes.set_xticks(lengths, [f"{length // 1024}k" for length in lengths])
        axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.suptitle(title)
    FigureCanvasAgg(figure).print_png(path)
