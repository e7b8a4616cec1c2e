"""Trains what a config describes, or goes on with it, in a work directory that holds everything about the run.

    python -m experiments.train --config=configs/lra/listops.py:mixer=s5 --workdir=runs/listops-s5
    python -m experiments.train --config=configs/lra/listops.py --config.train.epochs=2 --workdir=runs/brief

The same command goes on with a run that was interrupted, wherever its directory lies by then, and shows the results of
one that is finished. Exit codes: 0 finished; 75 left after saving because of SIGTERM, Ctrl-C or --stop_after_seconds,
run the command again to go on; 65 a loss was not finite; 2 the config or the work directory cannot be used. Signals
before the first step end the process as usual: nothing is lost.
"""

import sys
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from experiments.config import loading as config_loading
from experiments.config.command_line import EXIT_DIVERGED, EXIT_INTERRUPTED, EXIT_REFUSED, REFUSALS, refuse
from experiments.parallel.mesh import Devices
from experiments.runs import plots
from experiments.runs import results as run_results
from experiments.runs.directory import RunDirectory
from experiments.runs.interrupts import Interrupted, Stop
from experiments.runs.logs import read_lines
from experiments.training import experiment, loop
from experiments.training.records import NonFiniteError

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Path of the config, and its arguments after a colon.", lock_config=True
)
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run; made if it does not exist.")
STOP_AFTER = flags.DEFINE_float("stop_after_seconds", None, "Save and leave after so long, startup included.")
NUM_DEVICES = flags.DEFINE_integer("num_devices", None, "Use the first so many devices; all if not given.")
CACHE = flags.DEFINE_string(
    "compilation_cache",
    None,
    "Folder of compiled programs; if not given, beside the workdir, but none on CPUs.",
)


def main(argv: list[str]) -> int:
    """Trains, tests and reports; returns the exit code."""
    if argv[1:]:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    if flags.FLAGS.verbosity <= 0:  # absl's default shows every move of every library
        logging.set_verbosity(logging.WARNING)
    try:
        stop = Stop(after_seconds=STOP_AFTER.value)
        config = config_loading.to_plain(CONFIG.value)
        run = RunDirectory.open(WORKDIR.value, config)
        if (finished := run.results()) is not None:
            print(f"{run.folder} is finished.\n{run_results.describe(finished)}")
            return 0
        _use_compilation_cache(Path(WORKDIR.value))
        devices = Devices.first(NUM_DEVICES.value)
        plan = experiment.build(config)
        plan.check_devices(devices)
        run.begin(config, plan.task.manifest, plan.groups_table)
    except REFUSALS as error:
        return refuse(error)
    print(
        f"{plan.model.num_parameters:,} parameters on {devices.describe()}\n{plan.groups_table}", flush=True
    )
    try:
        with stop:
            outcome = loop.train(plan, run, devices=devices, stop=stop)
    except Interrupted as left:
        print(f"Saved and left because of {left}. The same command goes on.", file=sys.stderr)
        return EXIT_INTERRUPTED
    except NonFiniteError as error:
        print(f"Stopped: not finite at {error}. {run.checkpoints} holds earlier steps.", file=sys.stderr)
        return EXIT_DIVERGED
    _report(plan, run, run_results.summarize(plan, outcome, devices))
    return 0


def _use_compilation_cache(workdir: Path) -> None:
    folder = CACHE.value
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


def parse_flags(argv: list[str]) -> list[str]:
    """Parses flags; a config that cannot be loaded or has no such field ends the process with a message."""
    flags.mark_flags_as_required(["config", "workdir"])
    try:
        return app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError) as error:
        message = error
        while isinstance(message, Exception):  # one within the other
            message = message.args[0]
        print(
            f"The config has no field {message}\n(--config.FIELD sets what the config names)", file=sys.stderr
        )
        sys.exit(EXIT_REFUSED)
    except REFUSALS as error:
        sys.exit(refuse(error))


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
