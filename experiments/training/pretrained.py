"""The state of training that starts from a trained model."""

import os

from experiments.parallel.mesh import Devices
from experiments.training.experiment import Experiment
from experiments.training.published import read_arrays
from experiments.training.state import StateLayout, TrainState
from experiments.training.teacher import begun


def initial_state(
    plan: Experiment, layout: StateLayout, devices: Devices, adapter: str | os.PathLike | None = None
) -> TrainState:
    """Returns the state before the first step: of `train.pretrained` or `train.distill.start` if given, and else from the seed.

    Args:
      adapter: folder of a low-rank adapter that is added to the matrices of the checkpoint.
    """
    seed = plan.config["seed"]
    if plan.distill is not None and plan.distill.start != "seed":
        return layout.initial(seed, begun(plan.model, plan.values, plan.source("start"), plan.task, seed))
    if plan.train.pretrained is None:
        return layout.initial(seed)
    parameters, statistics = read_arrays(plan.config, devices, adapter)
    if frozen := plan.model.frozen:
        return layout.initial(seed, ({}, statistics | {name: parameters[name] for name in frozen}))
    return layout.initial(seed, (parameters, statistics))
