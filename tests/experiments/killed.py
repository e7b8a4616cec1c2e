"""`experiments.train` on the tiny task or a tiny text in processes that are killed, again and again, and left to end.

    python -m tests.experiments.killed --folder=DIR --kills=40 --seed=0 --task=tiny

Each process is forked from this one, which has imported everything, and runs the same command in the same work directory.
SIGKILL comes at a random number of operations on files of the run (opening, creating, renaming, deleting; start-up and results
are among them), or after a random time, which also hits what Orbax writes in threads of its own. When a run ends, its numbers
are compared with those of a run that was left alone, and another begins. Prints a summary as JSON.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from experiments import train
from experiments.runs.logs import read_lines
from experiments.training import experiment
from tests.experiments import language_config, tiny

OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}
TIMED = {"seconds", "tokens_per_second"}
FLAGS = {
    "tiny": (
        "--config=tests/experiments/tiny_config.py",
        "--num_devices=1",
        "--config.train.epochs=2",
        "--config.data.bucket_bounds=(8,)",
        "--config.train.checkpoint_every=2",
        "--config.train.keep_last=1",
    ),
    "language": (
        "--config=tests/experiments/language_config.py:folder=FOLDER",
        "--num_devices=1",
        "--config.train.keep_last=1",
    ),
}


def start(workdir: Path, flags: Sequence[str], last: int | None, report: Path | None = None) -> int:
    """Forks a process that trains in the work directory and is killed before operation number `last` on its files."""
    if child := os.fork():
        return child
    done: list[str] = []

    def audit(event: str, arguments: tuple) -> None:
        if event in OPERATIONS and str(arguments[0]).startswith(str(workdir)):
            done.append(event)
            if len(done) == last:
                os.kill(os.getpid(), signal.SIGKILL)

    quiet = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(quiet, stream)
    sys.addaudithook(audit)
    code = 99
    try:
        code = train.main([*flags, f"--workdir={workdir}"])
        if report is not None:
            report.write_text(json.dumps(len(done)))
    finally:
        os._exit(code)


def wait(child: int, seconds: float | None = None) -> int:
    """Returns the exit code of the process, -9 if it was killed; kills it after some seconds, if given."""
    timer = threading.Timer(seconds, os.kill, (child, signal.SIGKILL)) if seconds is not None else None
    if timer:
        timer.start()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if timer:
        timer.cancel()
        timer.join()
    return code


def numbers(workdir: Path) -> dict:
    """All numbers of a finished run that do not depend on the clock."""

    def untimed(values: dict) -> dict:
        return {name: value for name, value in values.items() if name not in TIMED}

    results = json.loads((workdir / "results.json").read_text())
    kept = ("best_step", "steps", "tokens", "parameters", "manifest_sha256")
    return {name: results[name] for name in kept} | dict(
        validation=untimed(results["validation"]),
        test=untimed(results["test"]),
        lines=[untimed(line) for line in read_lines(workdir / "metrics.jsonl")],
        checkpoints=sorted(path.name for path in (workdir / "checkpoints").iterdir()),
        arrays={
            str(path.relative_to(workdir)): json.loads(path.read_text())["record"]["score"]
            for path in sorted((workdir / "checkpoints").glob("*/hashes.json"))
        },
    )


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--task", choices=FLAGS, default="tiny")
    args = parser.parse_args()
    flags = [flag.replace("FOLDER", str(args.folder)) for flag in FLAGS[args.task]]
    if args.task == "tiny":
        experiment.make_task, experiment.build_model = tiny.make_tiny_task, tiny.build_tiny_model
    else:
        language_config.write_text(args.folder)
    rng = random.Random(args.seed)
    whole, report = args.folder / "whole", args.folder / "operations"
    assert wait(start(args.folder / "warm", flags, None)) == 0  # fills the cache of compiled programs
    began = time.monotonic()
    assert wait(start(whole, flags, None, report)) == 0
    duration, operations = time.monotonic() - began, json.loads(report.read_text())
    expected = numbers(whole)
    summary = dict(kills=0, sessions=0, runs=0, operations=operations, duration=round(duration, 2), wrong=[])
    workdir = args.folder / "run"
    while summary["kills"] < args.kills or summary["runs"] == 0:
        summary["sessions"] += 1
        enough = summary["kills"] >= args.kills
        by_time = not enough and summary["sessions"] % 4 == 0
        last = None if by_time or enough else 1 + rng.randrange(operations // 2)
        code = wait(start(workdir, flags, last), rng.uniform(0.3, 1.0) * duration if by_time else None)
        if code == -signal.SIGKILL:
            summary["kills"] += 1
            continue
        found = numbers(workdir) if code == 0 else {"exit code": code}
        if found != expected:
            summary["wrong"].append(
                {name: found.get(name) for name in found if found[name] != expected.get(name)}
            )
        summary["runs"] += 1
        shutil.rmtree(workdir)
    print(json.dumps(summary))
    return 1 if summary["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
