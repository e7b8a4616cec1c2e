"""Evaluates a checkpoint of a run, from its work directory alone.

    python -m experiments.evaluate --workdir=runs/listops-s5 --split=test --checkpoint=best

Prints the metrics as JSON and writes them to evaluation-SPLIT-STEP.json in the work directory.
"""

from absl import flags

from experiments import command_line, experiment
from experiments.checkpoints import Checkpoints
from experiments.command_line import REFUSALS, refuse
from experiments.devices import Devices
from experiments.evaluation import Evaluator
from experiments.files import to_json_text, write_atomically
from experiments.loop import restore
from experiments.run_directory import RunDirectory, WorkdirError

WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
SPLIT = flags.DEFINE_string("split", "test", "Split of the task.")
CHECKPOINT = flags.DEFINE_string("checkpoint", "best", "best (of validation), last, or a step.")
NUM_DEVICES = flags.DEFINE_integer("num_devices", None, "Use the first so many devices; all if not given.")


def main(_: list[str]) -> int:
    """Evaluates and reports; returns the exit code."""
    run = RunDirectory(WORKDIR.value)
    try:
        config = run.config()
        with Checkpoints(run.checkpoints) as checkpoints:
            step = choose_step(checkpoints, CHECKPOINT.value)
            devices = Devices.first(NUM_DEVICES.value)
            plan = experiment.build(config)
            evaluate = Evaluator(plan, plan.step_functions(devices), devices)
            plan.eval_batches(SPLIT.value)  # refuses an unknown split before anything is computed
            state, _ = restore(plan, checkpoints, step)
    except REFUSALS as error:
        return refuse(error)
    metrics = evaluate(devices.replicate(state), SPLIT.value)
    record = to_json_text(
        dict(split=SPLIT.value, step=step, devices=devices.describe(), baselines=plan.baselines(SPLIT.value))
        | metrics
    )
    write_atomically(run.folder / f"evaluation-{SPLIT.value}-{step}.json", record)
    print(record, end="")
    return 0


def choose_step(checkpoints: Checkpoints, which: str) -> int:
    """The step that "best", "last" or a number means.

    Raises:
      WorkdirError: if there is no such checkpoint; the message names those that there are.
    """
    if which not in ("best", "last") and not which.isdecimal():
        raise WorkdirError(f"checkpoint={which!r}; expected best, last or a step")
    step = {"best": checkpoints.best, "last": checkpoints.latest}.get(which)
    step = int(which) if which.isdecimal() else step
    if step not in checkpoints.steps:
        known = ", ".join(map(str, checkpoints.steps)) or "none"
        raise WorkdirError(f"checkpoint={which}: there is no such checkpoint; steps with one: {known}")
    return step


if __name__ == "__main__":
    command_line.run(main, required=["workdir"])
