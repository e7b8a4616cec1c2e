"""Trains what a config describes, or resumes it, in a work directory that holds everything about the run.

    python -m experiments.train --config=configs/lra/listops.py:mixer=s5 --workdir=runs/listops-s5
    python -m experiments.train --config=configs/lra/listops.py --config.train.epochs=2 --workdir=runs/brief

Several processes train one run if each receives the same command and `--distributed` (SLURM, Kubernetes, Open MPI, TPU
pods), or `--coordinator`, `--num_processes` and `--process_id`. They share the work directory.

--config.SECTION.FIELD=VALUE sets any field of the config, even one that the file leaves out. The same command resumes an
interrupted run, even if its directory has moved, and shows the results of a finished one. A larger --config.train.steps or
--config.train.epochs extends a run whose schedule is "constant" or "rsqrt", or "wsd" before its decay.

Every checkpoint carries hashes of its files. A damaged one is named and set aside as STEP.damaged, and the run resumes from
the one before.

Exit codes: 0 finished; 75 left because of SIGTERM, SIGHUP, Ctrl-C or --stop_after_seconds, after saving, or at once where
there is nothing to save, as during compilation, and the same command resumes; 65 a loss in training was not finite; 69
another process of the run was lost, and the same commands resume; 2 the config or the work directory cannot be used, or
cannot be written to, as on a full disk, or the device has too little memory. A signal before compilation ends the process as usual: nothing is lost.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.config.command_line import (
    EXIT_DIVERGED,
    EXIT_INTERRUPTED,
    EXIT_LOST,
    EXIT_REFUSED,
    REFUSALS,
    Parser,
    folder,
    positive_number,
    refuse,
)
from experiments.parallel import hosts
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
        "--stop_after_seconds", type=positive_number, help="save and leave after this time, startup included"
    )
    parser.add_argument("--num_devices", type=int, help="use the first devices, this many (default: all)")
    parser.add_argument(
        "--check", action="store_true", help="refuse what training would refuse, and train and write nothing"
    )
    parser.add_argument(
        "--compilation_cache",
        type=folder,
        help="folder of compiled programs (default: beside the workdir; on CPUs none)",
    )
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="join the processes that the cluster's launcher has started",
    )
    parser.add_argument("--coordinator", help="HOST:PORT of process 0, where no launcher says so")
    parser.add_argument("--num_processes", type=int, help="processes of the run")
    parser.add_argument("--process_id", type=int, help="number of this process, from 0")
    args = parser.parse_args(argv)
    try:
        stop = Stop(after_seconds=args.stop_after_seconds, exit_code=EXIT_INTERRUPTED)
        several = (args.coordinator, args.num_processes, args.process_id)
        if args.distributed or any(value is not None for value in several):
            hosts.connect(*several)
        run = RunDirectory(args.workdir)
        known = run.check(args.config)
        if known is not None and (finished := run.results_of(args.config)) is not None:
            print(f"{run.folder} is finished.\n{run_results.describe(finished)}")
            return 0
        _use_compilation_cache(args.compilation_cache, args.workdir)
        plan = experiment.build(args.config)
        devices = Devices.first(args.num_devices, plan.mesh)
        plan.check(devices)
        run.check(args.config, plan.extension_problem)
        if args.check:
            print(f"{plan.model.describe()}; nothing is refused")
            return 0
        run = _open_run(args.workdir, plan)
        if hosts.is_main():
            run.begin(args.config, plan.task.manifest, plan.groups_table)
    except REFUSALS as error:
        return refuse(error)
    except KeyboardInterrupt:
        print("\nLeft before the first step: nothing is lost.", file=sys.stderr)
        return EXIT_INTERRUPTED
    if hosts.is_main():
        print(
            f"{plan.model.describe()} on {devices.describe()}\n{plan.groups_table}",
            flush=True,
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
    except (OSError, jax.errors.JaxRuntimeError) as error:
        if (reason := hosts.lost_process(error)) is None:
            if isinstance(error, OSError):  # such as a full disk, or a checkpoint that cannot be read
                return refuse(error)
            if "RESOURCE_EXHAUSTED" in str(error):
                print(_out_of_memory(error, devices), file=sys.stderr)
                return EXIT_REFUSED
            raise
        print(
            f"Stopped: {reason}. The same commands resume from {run.checkpoints}.",
            file=sys.stderr,
            flush=True,
        )
        hosts.leave(EXIT_LOST)
    try:
        if hosts.is_main():
            _report(plan, run, run_results.summarize(plan, outcome, devices))
    except OSError as error:
        return refuse(error)
    hosts.wait_for_all("results")
    return 0


def _out_of_memory(error: Exception, devices: Devices) -> str:
    reason = str(error).strip().partition("\n")[0]
    return (
        f"{devices.describe()} has too little memory for this config: {reason}\nA smaller train.batch_size, a larger "
        "train.accumulate, model.remat=full or a larger mesh.fsdp takes less; earlier checkpoints stay."
    )


def _open_run(folder: Path, plan: experiment.Experiment) -> RunDirectory:
    """Returns the run's folder, created and locked by process 0 after all processes have looked into it."""
    hosts.wait_for_all("all have checked")
    if hosts.is_main():
        run = RunDirectory.open(folder, plan.config, plan.extension_problem)
    else:
        run = RunDirectory(folder)
    hosts.wait_for_all("run directory")
    return run


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
    run.write_results(record)  # last, since it marks the run as finished
    print(run_results.describe(record))


if __name__ == "__main__":
    sys.exit(main())
