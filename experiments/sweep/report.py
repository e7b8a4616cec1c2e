"""The results of a sweep as a table and a plot."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.sweep.study import Study

Cells = dict[str, dict[str, tuple[float, float, tuple[float, ...]]]]


def summarize(study: Study, records: Iterable[Mapping[str, Any]]) -> Cells:
    """Returns, by row and column, the mean over seeds, the spread (highest minus lowest) and the chosen learning rates.

    The rate is the one with the best mean validation over seeds. A value that is not finite, null in the records, counts
    as the worst: 0, or infinity where less is better. Columns that are merged have the means of their values and spreads, and all their
    rates; where one is missing, there is none. Trivial predictors have no rate.
    """
    groups: dict[tuple[str, str], dict[float, list[Mapping[str, Any]]]] = {}
    for record in records:
        for column in record["test"]:
            groups.setdefault((record["row"], column), {}).setdefault(record["learning_rate"], []).append(
                record
            )
    cells: Cells = {row: {} for row in dict.fromkeys(job.row for job in study.jobs)}
    for (row, column), by_rate in groups.items():
        scores = {
            rate: np.mean([study.score(run["validation"]) for run in runs]) for rate, runs in by_rate.items()
        }
        best = max(scores, key=lambda rate: (scores[rate], -rate))
        worst = np.inf if study.lower else 0.0
        values = [_or(run["test"][column], worst) for run in by_rate[best]]
        cells[row][column] = float(np.mean(values)), float(np.ptp(values)), (best,)
    cells |= _beside(study, groups)
    if study.merged:
        cells = {row: _merged(study, row, found) for row, found in cells.items()}
    return {row: columns for row, columns in cells.items() if columns}


def _merged(
    study: Study, row: str, found: Mapping[str, tuple[float, float, tuple[float, ...]]]
) -> dict[str, tuple[float, float, tuple[float, ...]]]:
    parts: dict[str, list[str]] = {}
    for job in study.jobs:
        if job.row == row:
            for column in job.columns:
                parts.setdefault(_shown(study, column), []).append(column)
    merged = {}
    for name, columns in parts.items():
        if found.keys() >= set(columns):
            values, spreads, rates = zip(*(found[column] for column in columns), strict=True)
            chosen = tuple(sorted({rate for several in rates for rate in several}))
            merged[name] = float(np.mean(values)), float(np.mean(spreads)), chosen
    return merged


def _shown(study: Study, column: str) -> str:
    return column.partition(": ")[0] if study.merged else column


def _beside(study: Study, groups: Mapping[tuple[str, str], Mapping[float, Any]]) -> Cells:
    """Returns the cells of trivial predictors, which every run has found alike."""
    cells: Cells = {}
    for job in study.jobs:
        for column in job.columns:
            for run, *_ in groups.get((job.row, column), {}).values():
                found = run["baselines"][study.place(job, column)[0]] if study.beside else {}
                for row, name in study.beside.items():
                    cells.setdefault(row, {})[column] = found[name.format(column)], 0.0, ()
    return cells


def _or(value: float | None, lowest: float) -> float:
    return lowest if value is None or not np.isfinite(value) else value


def table(study: Study, cells: Cells) -> str:
    """Returns a Markdown table, in percent unless of losses; with several seeds, values are followed by their spread."""
    columns = list(dict.fromkeys(_shown(study, column) for job in study.jobs for column in job.columns))
    lines = [["", *columns, *(["average"] if study.average else []), "learning rates"]]
    for row, found in cells.items():
        line = [row]
        for column in columns:
            value, spread, _ = found.get(column, (None, 0, 0))
            line.append(
                "" if value is None else study.shown(value) + (f" ({study.shown(spread)})" if spread else "")
            )
        if study.average:
            complete = len(found) == len(columns)
            line.append(study.shown(np.mean([value for value, _, _ in found.values()])) if complete else "")
        rates = dict.fromkeys(f"{rate:g}" for _, _, several in found.values() for rate in several)
        lines.append([*line, ", ".join(rates)])
    lines.insert(1, ["---"] * len(lines[0]))
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    chance = "" if study.chance is None else f"\n\nGuessing gives {study.shown(study.chance)}."
    unit = "" if study.lower else ", percent"
    return f"{study.title}: {study.metric} on the test split{unit}\n\n{body}{chance}\n"


def made_by(name: str, records: Iterable[Mapping[str, Any]], missing: int) -> str:
    """Returns the command, devices and versions of a table, and the number of missing jobs."""
    records = list(records)

    def several(values: Iterable[str]) -> str:
        return "; ".join(dict.fromkeys(values))

    versions = (
        ", ".join(f"{package} {number}" for package, number in record["versions"].items())
        for record in records
    )
    lines = [
        f"`python -m experiments.sweep --study={name} --out=runs/sweeps/{name}`: {len(records)} runs on {several(r['device'] for r in records)}",
        several(versions),
    ]
    if missing:
        lines.append(f"Jobs not run: {missing}. Cells and rows without them are left out.")
    return "\n\n".join(lines) + "\n"


def draw(study: Study, cells: Cells, path: Path) -> None:
    """Draws curves against the numbers in the columns' names, with bars as long as the spread, or bars of the average over columns."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    if study.axis is None:
        means: Sequence[float] = [
            float(np.mean([v for v, _, _ in found.values()])) for found in cells.values()
        ]
        axes.barh(list(cells), means)
        axes.invert_yaxis()
        axes.set(xlabel=study.metric, xlim=(0, 1))
        if study.chance is not None:
            axes.axvline(study.chance, color="0.4", linestyle="--", linewidth=1)
    else:
        for number, (row, found) in enumerate(cells.items()):
            points = sorted(
                (float(column), value, spread / 2) for column, (value, spread, _) in found.items()
            )
            style = ("-", "--", ":")[number // 10 % 3] if row not in study.beside else "--"
            x, y, half = zip(*points)
            axes.errorbar(x, y, half, marker="o", markersize=3, capsize=2, linestyle=style, label=row)
        axes.set_xscale("log", base=2)
        ticks = sorted({float(column) for found in cells.values() for column in found})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        limits = {"ylim": (-0.02, None if study.lower else 1.02)}
        axes.set(xlabel=study.axis, ylabel=study.metric, **limits)
        if study.chance is not None:
            axes.axhline(study.chance, color="0.4", linestyle="--", linewidth=1, label="guessing")
        figure.legend(fontsize=8, loc="outside right upper")
    axes.set_title(study.title, fontsize=10)
    axes.grid(alpha=0.3)
    FigureCanvasAgg(figure).print_png(path)
