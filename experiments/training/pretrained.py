"""The state of training that starts from a published checkpoint."""

import os

from experiments.parallel.mesh import Devices
from experiments.training.experiment import Experiment
from experiments.training.published import read_arrays
from experiments.training.state import StateLayout, TrainState


def initial_state(
    plan: Experiment, layout: StateLayout, devices: Devices, adapter: str | os.PathLike | None = None
) -> TrainState:
    """Returns the state before the first step: of `train.pretrained` if it names a checkpoint, and else from the seed.

    Args:
      adapter: folder of a low-rank adapter that is added to the matrices of the checkpoint.
    """
    seed = plan.config["seed"]
    if plan.train.pretrained is None:
        return layout.initial(seed)
    parameters, statistics = read_arrays(plan.config, devices, adapter)
    if frozen := plan.model.frozen:
        return layout.initial(seed, ({}, statistics | {name: parameters[name] for name in frozen}))
    return layout.initial(seed, (parameters, statistics))
