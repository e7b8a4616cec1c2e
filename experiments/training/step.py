"""One training step and one evaluation batch as pure functions.

`StepFunctions.step` is the function that the loop, the sweeps (under `jax.vmap`) and the profiler share. Training steps
and evaluation return their metrics as one float32 vector. Its first entries are the task's sums over examples, named by
`metric_names`. In a training step, these are followed by the auxiliary loss of the model if it has one (see
`layers.parameters`) and the parts of the loss of distillation (see `experiments.training.distillation`), also as sums over
examples, the global gradient norm, the learning rate and the number of real tokens.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.parallel.mesh import Devices
from experiments.training.distillation import DistillConfig, distilled
from experiments.training.model import Arrays, SplitModel
from experiments.training.optimizers import Optimizer, StepCount
from experiments.training.state import StateLayout, TrainState
from layers.kernels import dispatch
from layers.typing import Array, Float
from seqmodels.recording import recording

Batch = Mapping[str, Array]
AUXILIARY = "auxiliary_loss"
STEP_METRICS = ("gradient_norm", "learning_rate", "tokens")


class OnMesh:
    """A jitted function that is traced, lowered and called in the mesh of some devices."""

    def __init__(self, function: Any, devices: Devices):
        self._function, self._devices = function, devices

    def __call__(self, *args: Any) -> Any:
        with self._devices.active():
            return self._function(*args)

    def lower(self, *args: Any) -> Any:
        """Lowers the function as `jax.jit` does."""
        with self._devices.active():
            return self._function.lower(*args)


class StepFunctions:
    """Training and evaluation of one model on one task.

    Attributes:
      metric_names: names of the task's sums.
      train_metric_names: names of all sums of a training step.
      layout: layout of the training state.
      train: jitted function (state, batch) -> (state, metrics). The state is donated.
      evaluate: jitted function (parameters, statistics, totals, batch) -> totals + metrics. The totals are donated.
    """

    def __init__(
        self,
        model: SplitModel,
        optimizer: Optimizer,
        loss: Callable[[Array, Batch], tuple[Array, dict[str, Array]]],
        *,
        metric_names: tuple[str, ...],
        devices: Devices,
        accumulate: int = 1,
        frozen: Callable[[], Arrays] | None = None,
        distill: DistillConfig | None = None,
    ):
        """Creates the functions without compiling anything.

        Args:
          loss: loss of the task: outputs and batch to the mean loss and the sums "loss", "count" and others.
          metric_names: names of those sums.
          accumulate: number of micro-batches per step.
          frozen: see `StateLayout`.
          distill: options of distillation, with which training batches are those that a teacher has read.
        """
        self._model, self._loss = model, loss
        self._optimizer, self._devices, self._accumulate = optimizer, devices, accumulate
        self._distill = distill
        self.layout = StateLayout(model, optimizer, devices, frozen)
        self.metric_names = metric_names
        beside = (AUXILIARY,) if model.has_auxiliary_loss else ()
        self.train_metric_names = (*metric_names, *beside, *(distill.metrics if distill else ()))
        shardings = (self.layout.shardings, devices.replicated)
        self.train = OnMesh(jax.jit(self.step, donate_argnums=0, out_shardings=shardings), devices)
        self.evaluate = OnMesh(
            jax.jit(self.add_evaluation, donate_argnums=2, out_shardings=devices.replicated), devices
        )

    def zero_totals(self) -> Float[Array, "m"]:
        """Returns zero sums."""
        return self._devices.replicate(np.zeros(len(self.metric_names), np.float32))

    def step(
        self, state: TrainState, batch: Batch, scale: Float[Array, ""] | float = 1.0
    ) -> tuple[TrainState, Float[Array, "m"]]:
        """Returns the state after one step on a batch, and the metrics of the step. A pure function.

        A batch without any label, or whose gradient norm is above `optimizer.skip_norm`, changes nothing but the number of
        steps, from which the learning rate follows.

        Args:
          scale: factor on the learning rates of all groups.
        """
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        gradients, statistics, sums = self._gradients(state, batch, key)
        labelled = sums["count"] > 0
        count = jnp.where(labelled, sums["count"], 1.0)
        gradients = {name: gradient / count for name, gradient in gradients.items()}
        norm = jnp.where(labelled, optax.tree.norm(gradients), 0.0)
        limit = self._optimizer.config.skip_norm
        taken = labelled if limit is None else labelled & ~(norm > limit)
        updates, optimizer = self.layout.transformation.update(gradients, state.optimizer, state.parameters)
        parameters = {
            name: (p + scale * updates[name]).astype(p.dtype) for name, p in state.parameters.items()
        }
        average = state.average
        if average is not None:
            keep = self._optimizer.config.ema
            average = {name: keep * old + (1 - keep) * parameters[name] for name, old in average.items()}
        rate = scale * self._optimizer.config.learning_rate * self._optimizer.schedule(state.step)
        metrics = [*self._ordered(sums, self.train_metric_names), norm, rate, count_tokens(batch)]
        new = TrainState(state.step + 1, parameters, statistics, optimizer, average, state.key)
        # The compiler fuses this choice with the update.
        new = jax.tree.map(
            lambda new, old: new if isinstance(new, StepCount) else jnp.where(taken, new, old),
            new,
            state._replace(step=new.step),
            is_leaf=lambda leaf: isinstance(leaf, StepCount),
        )
        return new, jnp.stack([jnp.asarray(metric, jnp.float32) for metric in metrics])

    def _gradients(
        self, state: TrainState, batch: Batch, key: Array
    ) -> tuple[Arrays, Arrays, dict[str, Array]]:
        """Returns gradients of the sum of losses, statistics, and sums of metrics over all micro-batches."""
        parameters = self.layout.packing.cut(state.parameters)

        def loss(parameters, statistics, batch, key):
            with recording() if self._distill and self._distill.hidden else nullcontext() as hidden:
                output, statistics = self._model(parameters, statistics, batch, key=key)
            _, sums = self._loss(output, batch)
            total = sums["loss"]
            if self._distill:
                total, parts = distilled(self._distill, sums, output, hidden or (), batch)
                sums |= parts
            if not self._model.has_auxiliary_loss:
                return total, (statistics, sums)
            auxiliary = self._model.auxiliary_loss(statistics) * sums["count"]
            return total + auxiliary, (statistics, sums | {AUXILIARY: auxiliary})

        def micro_batch(statistics, batch, key):
            (_, (statistics, sums)), gradients = jax.value_and_grad(loss, has_aux=True)(
                parameters, statistics, batch, key
            )
            return self._divided(self.layout.packing.join(gradients)), statistics, sums

        def add_micro_batch(carry, inputs):
            statistics, gradients, sums = carry
            batch, number = inputs
            new_gradients, statistics, new_sums = micro_batch(
                statistics, batch, jax.random.fold_in(key, number)
            )
            added = jax.tree.map(jnp.add, (gradients, sums), (new_gradients, new_sums))
            return (statistics, *added), None

        if self._accumulate == 1:
            return micro_batch(state.statistics, batch, jax.random.fold_in(key, 0))
        zeros = (
            {name: jnp.zeros(p.shape, jnp.float32) for name, p in state.parameters.items()},
            {name: jnp.zeros((), jnp.float32) for name in self.train_metric_names},
        )
        inputs = (self._micro_batches(batch), jnp.arange(self._accumulate))
        (statistics, gradients, sums), _ = jax.lax.scan(add_micro_batch, (state.statistics, *zeros), inputs)
        return gradients, statistics, sums

    def _divided(self, gradients: Arrays) -> Arrays:
        """Returns gradients sharded like their parameters, so that they are summed where they are needed."""
        if len(self._devices) == 1:
            return gradients
        shardings = self.layout.shardings.parameters
        return {
            name: jax.lax.with_sharding_constraint(gradient, shardings[name])
            for name, gradient in gradients.items()
        }

    def _micro_batches(self, batch: Batch) -> dict[str, Array]:
        """Returns micro-batches of every `accumulate`-th row, so that rows stay on their device."""

        def cut(array: Array) -> Array:
            array = array.reshape(-1, self._accumulate, *array.shape[1:]).swapaxes(0, 1)
            return jax.lax.with_sharding_constraint(array, self._devices.of_batch(array.shape, micro=True))

        return {name: cut(array) for name, array in batch.items()}

    def add_evaluation(
        self, parameters: Arrays, statistics: Arrays, totals: Float[Array, "m"], batch: Batch
    ) -> Float[Array, "m"]:
        """Returns the totals with the sums over one more batch added. A pure function."""
        output, _ = self._model(self.layout.packing.cut(parameters), statistics, batch, key=None)
        _, sums = self._loss(output, batch)
        return totals + jnp.stack(self._ordered(sums, self.metric_names))

    def _ordered(self, sums: dict[str, Array], names: tuple[str, ...]) -> list[Array]:
        return [sums[name] for name in names]


def count_tokens(batch: Batch) -> Array:
    """Returns the number of real tokens of a batch, without padding."""
    if "segment_ids" in batch:
        return jnp.sum(batch["segment_ids"] != 0)
    inputs = batch["inputs"]
    return jnp.asarray(inputs.shape[0] * inputs.shape[1])


def means(names: tuple[str, ...], sums: np.ndarray) -> dict[str, float]:
    """Returns the averages: each sum NAME divided by the sum NAME_count if there is one, or else by "count".

    The average of nothing, with a count of 0, is NaN.
    """
    values = dict(zip(names, map(float, sums), strict=True))
    suffix = "_count"
    counts = {name.removesuffix(suffix): value for name, value in values.items() if name.endswith(suffix)}
    count = values.pop("count")
    return {
        name: value / total if (total := counts.get(name, count)) else math.nan
        for name, value in values.items()
        if not name.endswith(suffix)
    }


def metric_names_of(model: SplitModel, loss: Callable[..., Any], batch: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the names of the task's sums without computing them.

    Raises:
      ValueError: if "loss" or "count" is not among them.
    """

    def shapes(declarations):
        return {name: jax.ShapeDtypeStruct(d.shape, d.dtype) for name, d in declarations.items()}

    # A trace of shapes alone, outside the mesh of the run: what it would pass over is not what training does.
    with dispatch.explained():
        _, sums = jax.eval_shape(
            lambda parameters, statistics, batch: loss(
                model(parameters, statistics, batch, key=None)[0], batch
            ),
            shapes(model.parameters),
            shapes(model.statistics),
            dict(batch),
        )
    names = tuple(sums)
    if missing := {"loss", "count"} - set(names):
        raise ValueError(f"the task's sums are {', '.join(names)}; they must include {' and '.join(missing)}")
    return names
