"""The trained language model of a run, from its work directory alone."""

from typing import NamedTuple

import jax

from experiments.config.command_line import ArgumentError
from experiments.data import cache
from experiments.parallel.mesh import Devices
from experiments.runs.checkpoints import Checkpoints, choose_step
from experiments.runs.directory import RunDirectory, WorkdirError
from experiments.training import experiment
from experiments.training.experiment import Experiment
from experiments.training.loop import restore
from seqmodels import LanguageModel


class Trained(NamedTuple):
    """A trained language model and what it was trained by.

    Attributes:
      run: the work directory.
      plan: the experiment; its task has a `tokenizer`.
      model: the model of the checkpoint, on the first device.
      step: step of the checkpoint.
    """

    run: RunDirectory
    plan: Experiment
    model: LanguageModel
    step: int


def open_run(workdir: str, checkpoint: str, *, option: str = "--workdir") -> Trained:
    """Returns the language model of a checkpoint of a run, with the tokenizer of its task.

    Args:
      workdir: work directory of the run.
      checkpoint: "best", "last" or a step.
      option: the argument that names the run, for messages.

    Raises:
      ArgumentError: the run is not one of a language model on a task that has a tokenizer.
      ValueError: there is no such run or checkpoint, or the checkpoint does not fit the model, or the tokenizer is not that
        of the run.
      CheckpointError: the checkpoint is damaged.
    """
    run = RunDirectory(workdir)
    config = run.config()
    if (kind := config["model"].get("kind")) != "language_model":
        raise ArgumentError(
            f"{option}={workdir}: the run's model is of kind {kind!r}; expected a language_model"
        )
    with Checkpoints(run.checkpoints) as checkpoints, cache.temporary_builds():
        step = choose_step(checkpoints, checkpoint)
        plan = experiment.build(config)
        if getattr(plan.task, "tokenizer", None) is None:
            name = config["task"]["name"]
            raise ArgumentError(
                f"{option}={workdir}: the task {name!r} of the run has no tokenizer; expected a task of texts"
            )
        _check_tokenizer(run, plan)
        layout = plan.step_functions(Devices.first(1)).layout
        state, _ = restore(layout, checkpoints, step)
    parameters = jax.jit(layout.packing.cut)(state.evaluated)
    return Trained(run, plan, plan.model.module(parameters, state.statistics), step)


def _check_tokenizer(run: RunDirectory, plan: Experiment) -> None:
    """Raises WorkdirError unless the tokenizer is that of training; other texts than those of training matter to nobody."""
    recorded, now = run.data() or {}, plan.task.tokenizer.manifest
    then = recorded.get("parameters", {}).get("tokenizer", now)
    if then != now:
        raise WorkdirError(
            f"workdir={run.folder} was trained with another tokenizer: {then} then, {now} now; restore the file of "
            "task.tokenizer, or the texts that it is made from"
        )
