"""The state of training on the device, and the form in which checkpoints store it.

On the device the parameters are one vector for each group of the optimizer (see `split_model`). A checkpoint stores
them, their moments and their average by the names of layers, which depends neither on the groups nor on the device.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from experiments.training.model import Layout, SplitModel, Vectors, path_name
from experiments.training.optimizers import Optimizer
from layers.typing import Array

# Told apart from the keys that initialise the parameters, which come from the same seed.
STEP_KEYS = 1


class TrainState(NamedTuple):
    """All that a training step reads and writes.

    Attributes:
      step: int32, steps taken.
      parameters: float32, one vector a group.
      statistics: running statistics of norms, one vector.
      moments: Adam's.
      average: exponential moving average of the parameters, or None.
      key: data of the base key; step n draws from fold_in(key, n).
    """

    step: Array
    parameters: Vectors
    statistics: Vectors
    moments: optax.ScaleByAdamState
    average: Vectors | None
    key: Array

    @property
    def evaluated(self) -> Vectors:
        """The parameters that evaluation uses: the average if there is one."""
        return self.parameters if self.average is None else self.average


class Layouts(NamedTuple):
    """Where parameters and statistics lie in their vectors."""

    parameters: Layout
    statistics: Layout


def initial_state(model: SplitModel, layouts: Layouts, optimizer: Optimizer, seed: int) -> TrainState:
    """The state before the first step, on the host."""
    parameters = layouts.parameters.join(model.parameters)
    key = jax.random.fold_in(jax.random.key(seed), STEP_KEYS)
    return TrainState(
        step=np.array(0, np.int32),
        parameters=parameters,
        statistics=layouts.statistics.join(model.statistics),
        moments=jax.tree.map(np.asarray, optimizer.init(parameters)),
        average=None if optimizer.config.ema is None else parameters,
        key=np.asarray(jax.random.key_data(key)),
    )


def to_stored(state: TrainState, layouts: Layouts) -> dict[str, Any]:
    """The state as nested dicts of NumPy arrays by the names of layers: copies, so that training may go on."""
    state = jax.tree.map(lambda array: np.array(array, copy=True), jax.device_get(state))
    return dict(
        step=state.step,
        key=state.key,
        parameters=_by_name(layouts.parameters, state.parameters),
        statistics=_by_name(layouts.statistics, state.statistics),
        average={} if state.average is None else _by_name(layouts.parameters, state.average),
        adam=dict(
            count=state.moments.count,
            mu=_by_name(layouts.parameters, state.moments.mu),
            nu=_by_name(layouts.parameters, state.moments.nu),
        ),
    )


def from_stored(stored: Mapping[str, Any], layouts: Layouts) -> TrainState:
    """The inverse of `to_stored`, on the host.

    Raises:
      ValueError: if names or shapes of arrays are not those of the model.
    """
    parameters, statistics = layouts
    adam = stored["adam"]
    return TrainState(
        step=stored["step"],
        parameters=_from_names(parameters, stored["parameters"]),
        statistics=_from_names(statistics, stored["statistics"]),
        moments=optax.ScaleByAdamState(
            count=adam["count"],
            mu=_from_names(parameters, adam["mu"]),
            nu=_from_names(parameters, adam["nu"]),
        ),
        average=_from_names(parameters, stored["average"]) if stored["average"] else None,
        key=stored["key"],
    )


def _by_name(layout: Layout, vectors: Vectors) -> dict[str, np.ndarray]:
    return {path_name(path): array for path, array in layout.cut(vectors).items()}


def _from_names(layout: Layout, stored: Mapping[str, np.ndarray]) -> Vectors:
    shapes = {path_name(path): (path, shape) for part in layout.groups.values() for path, shape in part}
    problems = [f"{name} is missing" for name in shapes if name not in stored]
    problems += [f"{name} is not in the model" for name in stored if name not in shapes]
    problems += [
        f"{name} is {stored[name].shape}, but {shape} in the model"
        for name, (_, shape) in shapes.items()
        if name in stored and stored[name].shape != shape
    ]
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"the checkpoint does not fit the model: {'; '.join(problems[:5])}{more}")
    return layout.join({path: stored[name] for name, (path, _) in shapes.items()})
