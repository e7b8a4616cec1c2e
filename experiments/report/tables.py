"""Tables of a report, as rows of text and as Markdown."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.report.published import CHANCE, FAIL, NOTES, PUBLISHED, TASKS, published
from experiments.report.runs import Run

EPOCHS = (1, 2, 5, 10, 20, 50, 100, 200)
RULE = (
    "Averages: over the five tasks without Path-X, and over all six, where a failure on Path-X (chance) counts as 50. Ours and "
    "published follow the same rule; an average needs all its tasks."
)
Rows = list[list[str]]
RUN_HEAD = (
    *(
        "run",
        "task",
        "model",
        "protocol",
        "seed",
        "metric",
        "test",
        "validation",
        "best step",
        "epochs",
        "parameters",
    ),
    *("training s", "compiling s", "tokens/s", "steps/s", "device"),
)


def seeds(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Returns the runs by label: those that differ in the seed alone share one, and other recipes of a model are numbered."""
    by_recipe: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        by_recipe.setdefault((run.model, run.task, run.recipe), []).append(run)
    count: dict[tuple[str, str], int] = {}
    groups: dict[str, list[Run]] = {}
    for (model, task, _), members in by_recipe.items():
        number = count[model, task] = count.get((model, task), 0) + 1
        groups.setdefault(model if number == 1 else f"{model} ({number})", []).extend(members)
    return groups


def lra_tables(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Returns, for each protocol that a run has, the accuracies of ours and those published, in percent.

    Returns:
      By protocol, rows by label: "ours" and "published", dicts of task to accuracy (null for chance), "seeds", dict of task to
      the number of runs, "spread", dict of task to highest minus lowest, and averages "five" and "six" of both.
    """
    tables: dict[str, dict[str, Any]] = {}
    for protocol in dict.fromkeys(run.protocol for run in runs):
        mine = [
            run for run in runs if run.protocol == protocol and run.task in TASKS and run.test is not None
        ]
        if not mine:
            continue
        rows: dict[str, Any] = {}
        for label, members in seeds(mine).items():
            by_task = {task: [100 * r.test for r in members if r.task == task] for task in TASKS}
            by_task = {task: values for task, values in by_task.items() if values}
            ours = {task: statistics.fmean(values) for task, values in by_task.items()}
            rows[label] = dict(
                ours=ours,
                spread={task: max(values) - min(values) for task, values in by_task.items()},
                seeds={task: len(values) for task, values in by_task.items()},
                published=published(protocol, label.partition(" ")[0]),
            )
        for mixer in PUBLISHED.get(protocol or "", {}):
            rows.setdefault(mixer, dict(ours={}, spread={}, seeds={}, published=published(protocol, mixer)))
        for row in rows.values():
            row["averages"] = {who: averages(row[who] or {}) for who in ("ours", "published")}
        tables[protocol or "not stated"] = rows
    return tables


def averages(values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Returns the averages "five" and "six" of `RULE`; None where a task is missing."""
    counted = {task: CHANCE if value is FAIL else value for task, value in values.items()}
    five = [counted[task] for task in TASKS[:-1] if task in counted]
    return {
        "five": statistics.fmean(five) if len(five) == len(TASKS) - 1 else None,
        "six": statistics.fmean(counted.values()) if len(counted) == len(TASKS) else None,
    }


def lra_markdown(protocol: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the table of a protocol in Markdown, each cell ours / published."""
    lines = [["", *TASKS, "average of 5", "of 6"]]
    for label, row in rows.items():
        cells = []
        for task in TASKS:
            ours = "–"
            if task in row["ours"]:
                ours = f"{row['ours'][task]:.2f}"
                if row["seeds"][task] > 1:
                    ours += f" ({row['seeds'][task]} seeds, spread {row['spread'][task]:.2f})"
            cells.append(f"{ours} / {_published(row['published'], task)}")
        cells += [
            " / ".join(_number(row["averages"][who][n]) for who in ("ours", "published"))
            for n in ("five", "six")
        ]
        lines.append([label, *cells])
    notes = [note for (of, mixer, _), note in NOTES.items() if of == protocol and mixer in rows]
    title = f'Protocol "{protocol}": test accuracy in percent, ours / published'
    return "\n\n".join([title, markdown(lines), " ".join([RULE, *notes])])


def _published(values: Mapping[str, float | None] | None, task: str) -> str:
    if values is None:
        return "–"
    return "fail" if values[task] is FAIL else f"{values[task]:.2f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def run_rows(runs: Sequence[Run]) -> Rows:
    """Returns a row per run: what it is, its metrics and what it cost."""
    lines = [list(RUN_HEAD)]
    for run in runs:
        results = run.results
        line = [run.name, run.task, run.model, run.protocol or "–", str(run.seed), run.metric]
        line += [_metric(run.test), _metric(run.best_validation)]
        if results is None:
            epoch = f"{run.curve[-1][0]:g}" if run.curve else "0"
            line += ["not finished", epoch, *["–"] * 6]
        else:
            seconds = results["training_seconds"]
            line += [
                f"{results['best_step']} of {results['steps']}",
                f"{results['steps'] / results['steps_per_epoch']:g}",
                f"{results['parameters']:,}",
                f"{seconds:.1f}",
                f"{results['compile_seconds']:.1f}",
                f"{results['tokens_per_second']:,.0f}",
                f"{results['steps'] / max(seconds, 1e-9):.2f}",
                results["devices"],
            ]
        lines.append(line)
    return lines


def epoch_rows(runs: Sequence[Run]) -> Rows:
    """Returns the validation metric of each run at the epochs of `EPOCHS` that any of them has reached."""
    reached = [epoch for epoch in EPOCHS if any(run.at_epoch(epoch) is not None for run in runs)]
    lines = [["run", "metric", *(f"epoch {epoch}" for epoch in reached), "last"]]
    for run in runs:
        if run.curve:
            last = f"{_metric(run.curve[-1][1])} (epoch {run.curve[-1][0]:g})"
            lines.append([run.name, run.metric, *(_metric(run.at_epoch(epoch)) for epoch in reached), last])
    return lines


def _metric(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def markdown(rows: Rows) -> str:
    """Returns rows, the first of which is the head, as a table."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
