"""Writes a report on run directories: Long Range Arena's table, learning curves, accuracy by epoch and cost, and speed.

    python -m experiments.report runs --out=reports/lra
    python -m experiments.report runs/listops-s5 runs/text-s5 --out=reports/lra

Each argument is a run directory or a folder with run directories at any depth. OUT receives report.md, report.json, curves.png,
cost.png and speed.png. Ours stand beside published accuracies, one table per protocol (`config.train.protocol`): two protocols
never share a column, and runs of other inputs, sizes or data than a task of Long Range Arena are listed apart. Runs that differ in
their seed alone are averaged. Only finished runs have a test accuracy; it is that of the best checkpoint of validation.
Exit codes: 0 done; 2 an argument is no run directory, or a file of a run is damaged.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.config.command_line import Parser, folder, path, reporting
from experiments.report import plots, tables
from experiments.report.runs import Run, read
from experiments.runs.files import to_json_text, write_atomically


@reporting
def main(argv: Sequence[str] | None = None) -> int:
    """Writes the report and returns the exit code."""
    parser = Parser("experiments.report", __doc__)
    parser.add_argument("runs", nargs="+", type=path, help="run directories, or folders with them")
    parser.add_argument("--out", required=True, type=folder, help="folder of the report")
    args = parser.parse_args(argv)
    runs = read(args.runs)
    args.out.mkdir(parents=True, exist_ok=True)
    plots.draw_curves(runs, args.out / "curves.png")
    plots.draw_cost(runs, args.out / "cost.png")
    plots.draw_speed(runs, args.out / "speed.png")
    found = tables.lra_tables(runs)
    write_atomically(args.out / "report.json", to_json_text(record(runs, found)))
    text = document(runs, found)
    write_atomically(args.out / "report.md", text)
    print(text)
    return 0


def document(runs: Sequence[Run], lra: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the report in Markdown."""
    parts = ["# Report"]
    if lra:
        parts.append("## Long Range Arena")
        parts += [tables.lra_markdown(protocol, rows) for protocol, rows in lra.items()]
    finished = sum(run.results is not None for run in runs)
    parts += [
        "## Runs",
        f"{len(runs)} run{'s' * (len(runs) != 1)}, {finished} finished. Test metrics are those of the best checkpoint of validation.",
        tables.markdown(tables.run_rows(runs)),
        "![Speed](speed.png)",
        "## Validation by epoch",
        tables.markdown(tables.epoch_rows(runs)),
        "![Learning curves](curves.png)",
        "![Best validation accuracy against the seconds of training](cost.png)",
    ]
    return "\n\n".join(parts) + "\n"


def record(runs: Sequence[Run], lra: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of report.json."""
    return dict(
        averages=tables.RULE,
        long_range_arena=lra,
        runs=[
            dict(
                name=run.name,
                task=run.task,
                model=run.model,
                protocol=run.protocol,
                seed=run.seed,
                metric=run.metric,
                test=run.test,
                validation=run.best_validation,
                curve=[
                    dict(epoch=epoch, value=value, training_seconds=seconds)
                    for epoch, value, seconds in run.curve
                ],
                results=run.results,
            )
            for run in runs
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
