"""Trains several mixers on one config, one after the other, and compares their results.

    python -m experiments.compare --config=configs/lra/listops_short.py --mixers=s5,attention --workdir=runs/first-look

The config must take an argument mixer=NAME. Everything that training would refuse, of any mixer, is refused before the first
run. Each run is one of `experiments.train` in its own folder WORKDIR/NAME, is
interrupted and resumed in the same way, and receives all further flags, such as --config.train.epochs=2. At the end the
command prints a table, and writes it to compare.json and the curves of all runs to curves.png in the work directory.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.config.command_line import REFUSALS, ArgumentError, Parser, refuse
from experiments.runs.directory import RunDirectory
from experiments.runs.files import to_json_text, write_atomically
from experiments.runs.plots import draw_curves
from experiments.runs.results import number, total_seconds
from experiments.runs.trainings import run_training


def main(argv: Sequence[str] | None = None) -> int:
    """Trains and compares; returns the exit code of the first run that does not finish, or else 0."""
    parser = Parser("experiments.compare", __doc__, workdir=True)
    parser.add_argument("--config", required=True, help="path of a config that takes mixer=NAME")
    parser.add_argument("--mixers", required=True, help="names of mixers, separated by commas")
    args, more = parser.parse_known_args(argv)
    mixers = [name.strip() for name in args.mixers.split(",")]
    if not all(mixers):
        return refuse(ArgumentError(f"--mixers={args.mixers}: a name is empty; separate them by one comma"))
    if twice := [name for name in mixers if mixers.count(name) > 1]:
        return refuse(ArgumentError(f"--mixers={args.mixers} names {twice[0]} twice; each has one folder"))
    flags = {
        mixer: [
            f"--config={with_argument(args.config, f'mixer={mixer}')}",
            f"--workdir={args.workdir / mixer}",
            *more,
        ]
        for mixer in mixers
    }
    for mixer in mixers:
        print(f"checking {mixer}", flush=True)
        if code := run_training([*flags[mixer], "--check"]):
            return code
    results = {}
    for place, mixer in enumerate(mixers, start=1):
        print(f"[{place}/{len(mixers)}] {mixer}", flush=True)
        if code := run_training(flags[mixer]):
            return code
        results[mixer] = RunDirectory(args.workdir / mixer).results()
    try:
        report(results, args.workdir)
    except REFUSALS as error:
        return refuse(error)
    return 0


def with_argument(config: str, argument: str) -> str:
    """Returns the config string with one more argument for its `get_config`."""
    path, colon, arguments = config.partition(":")
    return f"{path}:{arguments},{argument}" if colon and arguments else f"{path}:{argument}"


def report(results: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """Prints the table, and writes it and the curves of all runs."""
    first = next(iter(results.values()))
    metric = first["selection"][0]
    split = "validation" if first["test"] is None else "test"
    rows = {
        name: dict(
            value=result[split][metric], seconds=total_seconds(result), parameters=result["parameters"]
        )
        for name, result in results.items()
    }
    print(table(f"{split} {metric}", rows, first["baselines"]))
    record = dict(
        split=split, metric=metric, runs=rows, baselines=first["baselines"], devices=first["devices"]
    )
    write_atomically(folder / "compare.json", to_json_text(record))
    logs = {name: RunDirectory(folder / name).log() for name in results}
    draw_curves(logs, folder / "curves.png", metric=metric, baselines=first["baselines"])
    print(f"curves: {folder / 'curves.png'}")


def table(heading: str, rows: Mapping[str, Mapping[str, Any]], baselines: Mapping[str, float]) -> str:
    """Returns a table of value, seconds and parameters of each run, then the values of the baselines."""
    lines = [("", heading, "seconds", "parameters")]
    lines += [
        (name, number(row["value"]), f"{row['seconds']:.0f}", f"{row['parameters']:,}")
        for name, row in rows.items()
    ]
    lines += [(name.replace("_", " "), number(value), "", "") for name, value in baselines.items()]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))]).rstrip()
        for line in lines
    )


if __name__ == "__main__":
    sys.exit(main())
