"""Trains what a config describes, or resumes it, in a work directory that holds everything about the run.

    python -m experiments.train --config=configs/lra/listops.py:mixer=s5 --workdir=runs/listops-s5
    python -m experiments.train --config=configs/lra/listops.py --config.train.epochs=2 --workdir=runs/brief

--config.SECTION.FIELD=VALUE sets any field of the config, also one that the file leaves out. The same command resumes a run
that was interrupted, wherever its directory lies by then, and shows the results of one that is finished.

Exit codes: 0 finished; 75 left after saving because of SIGTERM, Ctrl-C or --stop_after_seconds, and the same command
resumes; 65 a loss was not finite; 2 the config or the work directory cannot be used. A signal before the first step ends
the process as usual: nothing is lost.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.config.command_line import EXIT_DIVERGED, EXIT_INTERRUPTED, REFUSALS, Parser, refuse
from experiments.parallel.mesh import Devices
from experiments.runs import plots
from experiments.runs import results as run_results
from experiments.runs.directory import RunDirectory
from experiments.runs.interrupts import Interrupted, Stop
from experiments.runs.logs import read_lines
from experiments.training import experiment, loop
from experiments.training.records import NonFiniteError


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, tests and reports; returns the exit code."""
    parser = Parser("experiments.train", __doc__, config=True, workdir=True)
    parser.add_argument(
        "--stop_after_seconds", type=float, help="save and leave after this time, startup included"
    )
    parser.add_argument("--num_devices", type=int, help="use the first devices, this many (default: all)")
    parser.add_argument(
        "--compilation_cache",
        type=Path,
        help="folder of compiled programs (default: beside the workdir; on CPUs none)",
    )
    args = parser.parse_args(argv)
    try:
        stop = Stop(after_seconds=args.stop_after_seconds)
        run = RunDirectory.open(args.workdir, args.config)
        if (finished := run.results()) is not None:
            print(f"{run.folder} is finished.\n{run_results.describe(finished)}")
            return 0
        _use_compilation_cache(args.compilation_cache, args.workdir)
        devices = Devices.first(args.num_devices)
        plan = experiment.build(args.config)
        plan.check_devices(devices)
        run.begin(args.config, plan.task.manifest, plan.groups_table)
    except REFUSALS as error:
        return refuse(error)
    print(
        f"{plan.model.num_parameters:,} parameters on {devices.describe()}\n{plan.groups_table}", flush=True
    )
    try:
        with stop:
            outcome = loop.train(plan, run, devices=devices, stop=stop)
    except Interrupted as left:
        print(f"Saved and left because of {left}. The same command resumes.", file=sys.stderr)
        return EXIT_INTERRUPTED
    except NonFiniteError as error:
        print(f"Stopped: not finite at {error}. {run.checkpoints} holds earlier steps.", file=sys.stderr)
        return EXIT_DIVERGED
    _report(plan, run, run_results.summarize(plan, outcome, devices))
    return 0


def _use_compilation_cache(folder: Path | None, workdir: Path) -> None:
    if folder is None and jax.default_backend() != "cpu":
        folder = workdir.absolute().parent / ".compilation_cache"
    if folder is not None:
        jax.config.update("jax_compilation_cache_dir", str(folder))


def _report(plan: experiment.Experiment, run: RunDirectory, record: dict[str, Any]) -> None:
    baselines = plan.baselines(loop.VALIDATION) if plan.selection[0] == "accuracy" else {}
    plots.draw_curves(
        {"run": read_lines(run.metrics)}, run.curves, metric=plan.selection[0], baselines=baselines
    )
    run.write_results(record)  # last: it marks the run as finished
    print(run_results.describe(record))


if __name__ == "__main__":
    sys.exit(main())
