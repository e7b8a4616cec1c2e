"""Runs a study of many small models on a synthetic task, or training runs with the overrides of a file, and reports them.

    python -m experiments.sweep --study=mqar --out=sweeps/mqar --stop_after_seconds=540
    python -m experiments.sweep --file=rates.py --config=configs/lra/listops.py:mixer=s5 --out=runs/rates
    python -m experiments.sweep --file=rates.py --config=configs/lra/listops.py --out=runs/rates --devices 0 1 2 3
    sbatch --array=0-7 --wrap "python -m experiments.sweep --file=rates.py --config=... --out=runs/rates --index=slurm"

With --file, get_sweep() of that file returns or yields a dict of values by field, or a list of FIELD=VALUE, for each run; the field
"config" is the config of that run (see `points`). The runs are trained one after the other, each in its folder OUT/NUMBER-WHAT; with
--index only one of them; with --devices as many at a time as it has items, each on the GPUs of its item and with its output in
OUT/NUMBER.log. All configs are checked first; finished runs are skipped, interrupted ones resumed, and the others
go on if one fails. OUT/table.md and OUT/sweep.json show all runs so far.

Studies: copying, induction, mqar, mad, parity, state_tracking, recall_state, mqar_paper, mad_harder, width_transfer (see `studies` and
`paper_studies`), and on a CPU in minutes linear_regression, copy_unique, count, mode, addition (see `small_studies`). Runs that
differ in learning rate and seed alone are
trained together. Every finished run is a line of OUT/runs.jsonl; the same command skips those, so it may be stopped and
repeated. OUT/table.md and OUT/plot.png show all runs so far. Cut or damaged lines of OUT/runs.jsonl are named, and their
runs are run again. Exit codes: 0 all runs are done; 75 some are left at the time limit, and the same command resumes; 1 all
others are done but some failed; 2 the arguments or the folder cannot be used.
"""

import argparse
import concurrent.futures
import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.config.command_line import (
    EXIT_INTERRUPTED,
    REFUSALS,
    ArgumentError,
    Parser,
    folder,
    path,
    positive_integer,
    positive_number,
    refuse,
)
from experiments.config.loading import differences, to_plain
from experiments.parallel.mesh import Devices
from experiments.runs.files import append_json_lines, read_json_lines, write_atomically
from experiments.runs.interrupts import Interrupted
from experiments.runs.sessions import git_revision, versions
from experiments.sweep import points
from experiments.sweep.replicas import Replicas
from experiments.sweep.report import draw, made_by, summarize, table
from experiments.sweep.studies import STUDIES
from experiments.sweep.study import Job, Study

AHEAD = 2  # number of jobs prepared and compiled while another trains


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the missing jobs and reports; returns the exit code."""
    parser = Parser("experiments.sweep", __doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--study", choices=tuple(STUDIES))
    what.add_argument(
        "--file", type=path, help="Python file whose get_sweep() gives the overrides of each run"
    )
    parser.add_argument("--config", help="with --file: config of the runs that name none")
    parser.add_argument(
        "--index", help="with --file: number of the only run to train, or slurm for the array's"
    )
    parser.add_argument(
        "--devices",
        nargs="+",
        metavar="GPU",
        help="with --file: runs at a time, one per item, on these GPUs each: 0 1, or 0,1 2,3; 0 0 for two runs on one GPU",
    )
    parser.add_argument("--out", required=True, type=folder, help="folder of the results")
    parser.add_argument(
        "--stop_after_seconds", type=positive_number, help="leave after this time, and start nothing more"
    )
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="run only these rows of the table")
    parser.add_argument(
        "--steps", type=positive_integer, help="steps of every run, in place of the study's, for a quick look"
    )
    args = parser.parse_args(argv)
    deadline = None if args.stop_after_seconds is None else time.monotonic() + args.stop_after_seconds
    try:
        _check_options(args)
        if args.file is not None:
            found = points.read(args.file, args.config)
            return points.run(points.chosen(found, args.index), found, args.out, deadline, args.devices)
        study = _shortened(STUDIES[args.study](), args.steps)
        chosen = _chosen(study, args.rows)
        args.out.mkdir(parents=True, exist_ok=True)
        Devices.first(1)  # raises where there is none
        if jax.default_backend() != "cpu":
            jax.config.update(
                "jax_compilation_cache_dir", str(args.out.absolute().parent / ".compilation_cache")
            )
    except REFUSALS as error:
        return refuse(error)
    try:
        left, failed = _run(study, chosen, args.out / "runs.jsonl", deadline)
        _report(args.study, study, args.out)
    except OSError as error:  # such as a full disk
        return refuse(error)
    if left:
        print(f"{left} of {len(chosen)} jobs are left; the same command resumes", file=sys.stderr)
    if failed:
        print(f"{failed} of {len(chosen)} jobs failed", file=sys.stderr)
    return EXIT_INTERRUPTED if left else 1 if failed else 0


def _check_options(args: argparse.Namespace) -> None:
    """Raises ArgumentError for an option that has no effect on what is run."""
    others = ("rows", "steps") if args.study is None else ("config", "index", "devices")
    for name in others:
        if getattr(args, name) is not None:
            wanted = "--file" if args.study is not None else "--study"
            raise ArgumentError(f"--{name} has no effect here; it goes with {wanted}")


def _report(name: str, study: Study, folder: Path) -> None:
    """Prints the table of all runs so far, and writes it and the plot to the folder."""
    known = _known(folder / "runs.jsonl")[0]
    found = [_done(job, known) for job in study.jobs]
    records = [record for runs in found for record in runs]
    if cells := summarize(study, records):
        text = f"{table(study, cells)}\n{made_by(name, records, missing=sum(not runs for runs in found))}"
        print(f"\n{text}")
        write_atomically(folder / "table.md", text)
        draw(study, cells, folder / "plot.png")


def _shortened(study: Study, steps: int | None) -> Study:
    if steps is None:
        return study
    changes = {"train.steps": steps, "optimizer.warmup_steps": min(10, steps - 1)}
    jobs = (dataclasses.replace(job, changes=job.changes | changes) for job in study.jobs)
    return dataclasses.replace(study, jobs=tuple(jobs))


def _chosen(study: Study, rows: Sequence[str] | None) -> tuple[Job, ...]:
    known = dict.fromkeys(job.row for job in study.jobs)
    for row in rows or ():
        if row not in known:
            raise ValueError(f"rows={row!r}; expected some of {'; '.join(known)}")
    return tuple(job for job in study.jobs if rows is None or job.row in rows)


def _run(study: Study, jobs: Sequence[Job], file: Path, deadline: float | None) -> tuple[int, int]:
    """Runs the jobs without lines in the file; returns how many are left at the deadline, and how many failed."""
    known, problems = _known(file)
    for problem in problems:
        print(f"{problem}; its run is run again", file=sys.stderr)
    missing = [job for job in jobs if len(_done(job, known)) < len(job.rates) * len(job.seeds)]
    print(f"{len(jobs) - len(missing)} of {len(jobs)} jobs are done", flush=True)
    pool = concurrent.futures.ThreadPoolExecutor(AHEAD)
    prepared = [pool.submit(_prepare, job) for job in missing[:AHEAD]]
    failed = 0
    try:
        for number, job in enumerate(missing):
            if deadline is not None and time.monotonic() > deadline:
                return len(missing) - number, failed
            if number + AHEAD < len(missing):
                prepared.append(pool.submit(_prepare, missing[number + AHEAD]))
            try:
                records = _train(study, job, prepared.pop(0).result(), deadline)
            except Interrupted:
                return len(missing) - number, failed
            except (
                *REFUSALS,
                jax.errors.JaxRuntimeError,
            ) as error:  # such as too little memory; other jobs may fit
                failed += 1
                print(f"[{number + 1}/{len(missing)}] {job.row} failed: {error}", file=sys.stderr, flush=True)
                continue
            append_json_lines(file, records)
            _progress(study, number + 1, len(missing), job, records)
        return 0, failed
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _prepare(job: Job) -> Replicas:
    return Replicas(job.plain_config(), job.rates, job.seeds)


def _train(study: Study, job: Job, replicas: Replicas, deadline: float | None) -> list[dict[str, Any]]:
    """Trains and evaluates the runs of a job; returns a record per run."""
    found = replicas.train(deadline=deadline)
    start = time.perf_counter()
    validation = replicas.evaluate("validation")
    splits = dict.fromkeys(study.place(job, column)[0] for column in job.columns)
    metrics = {split: replicas.evaluate(split) for split in splits}
    test = {
        column: [found[study.place(job, column)[1]] for found in metrics[study.place(job, column)[0]]]
        for column in job.columns
    }
    common = dict(
        row=job.row,
        parameters=replicas.num_parameters,
        seconds_together=dict(
            compiling=round(replicas.compile_seconds, 2),
            training=round(found["seconds"], 2),
            evaluating=round(time.perf_counter() - start, 2),
        ),
        config=job.plain_config(),
        device=Devices.first(1).describe(),
        versions=versions(),
        git=git_revision(),
    )
    if study.beside:
        common["baselines"] = {split: replicas.baselines(split) for split in splits}
    return [
        dict(
            learning_rate=rate,
            seed=seed,
            validation=validation[copy][study.metric],
            test={column: values[copy] for column, values in test.items()},
            metrics={column: metrics[study.place(job, column)[0]][copy] for column in job.columns},
            losses=[round(float(loss), 5) for loss in found["losses"][:, copy]],
            **common,
        )
        for copy, (rate, seed) in enumerate(replicas.runs)
    ]


def _known(file: Path) -> tuple[list[Mapping[str, Any]], list[str]]:
    """Returns the runs in the file, and a description of each line that is none."""
    fields = ("row", "config", "learning_rate", "seed", "validation", "test", "device", "versions")
    return read_json_lines(file, fields, lambda record: to_plain(record["config"]))


def _done(job: Job, known: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns the runs of this job, the newest for each learning rate and seed."""
    config = job.plain_config()
    runs = {
        (record["learning_rate"], record["seed"]): record
        for record in known
        if record["row"] == job.row and not differences(to_plain(record["config"]), config)
    }
    return list(runs.values())


def _progress(study: Study, number: int, count: int, job: Job, records: Sequence[Mapping[str, Any]]) -> None:
    best = max(records, key=lambda record: study.score(record["validation"]))
    seconds = best["seconds_together"]
    shown = ", ".join(f"{column} {study.shown(value)}" for column, value in best["test"].items())
    print(
        f"[{number}/{count}] {job.row}: {shown} at {best['learning_rate']:g}; "
        f"{seconds['compiling']:.0f} s compiling, {seconds['training']:.0f} s training {len(records)} runs",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
