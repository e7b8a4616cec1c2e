"""Evaluates a checkpoint of a run, from its work directory alone.

    python -m experiments.evaluate --workdir=runs/listops-s5 --split=test --checkpoint=best

Prints the metrics as JSON and writes them to evaluation-SPLIT-STEP.json in the work directory, if it can be written to.
Nothing is written elsewhere: data that the config generates and that are not on disk yet are generated in a temporary folder.

A damaged checkpoint is named and left out: "best" and "last" then mean the best and the last of the others, and a step is
refused.
"""

import sys
from collections.abc import Sequence

from experiments.config.command_line import REFUSALS, Parser, refuse
from experiments.data import cache
from experiments.parallel.mesh import Devices
from experiments.runs.checkpoints import Checkpoints, choose_step
from experiments.runs.directory import RunDirectory
from experiments.runs.files import to_json_text, write_atomically
from experiments.training import experiment
from experiments.training.evaluation import Evaluator
from experiments.training.loop import restore


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluates and reports; returns the exit code."""
    parser = Parser("experiments.evaluate", __doc__, workdir=True)
    parser.add_argument("--split", default="test", help="split of the task (default: test)")
    parser.add_argument(
        "--checkpoint", default="best", help="best (of validation; the default), last, or a step"
    )
    parser.add_argument("--num_devices", type=int, help="use the first devices, this many (default: all)")
    args = parser.parse_args(argv)
    run = RunDirectory(args.workdir)
    try:
        config = run.config()
        with Checkpoints(run.checkpoints) as checkpoints, cache.temporary_builds():
            step = choose_step(checkpoints, args.checkpoint)
            plan = experiment.build(config)
            devices = Devices.first(args.num_devices, plan.mesh)
            functions = plan.step_functions(devices)
            plan.eval_batches(args.split)  # raises for an unknown split before anything is computed
            state, _ = restore(functions.layout, checkpoints, step)
        evaluate = Evaluator(plan, functions, devices)
    except REFUSALS as error:
        return refuse(error)
    evaluate.compile(state, args.split)
    metrics = evaluate(state, args.split)
    record = dict(split=args.split, step=step, devices=devices.describe()) | metrics
    text = to_json_text(record | dict(baselines=plan.baselines(args.split)))
    print(text, end="", flush=True)
    file = run.folder / f"evaluation-{args.split}-{step}.json"
    try:
        write_atomically(file, text)
    except OSError as error:
        print(f"{file} cannot be written: {error.strerror}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
