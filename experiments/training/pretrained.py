"""The state of training that starts from a published checkpoint."""

from experiments.parallel.mesh import Devices
from experiments.training.experiment import Experiment
from experiments.training.model import arrays_of
from experiments.training.state import StateLayout, TrainState
from seqmodels.interop.loading import load_weights


def initial_state(plan: Experiment, layout: StateLayout, devices: Devices) -> TrainState:
    """Returns the state before the first step: of `train.pretrained` if it names a checkpoint, and else from the seed."""
    seed, folder = plan.config["seed"], plan.train.pretrained
    if folder is None:
        return layout.initial(seed)
    model = load_weights(folder, dict(plan.config["model"]), mesh=devices.mesh, rules=devices.rules)
    return layout.initial(seed, arrays_of(model))
