"""The arithmetic of one training step and of one evaluation batch, as jitted functions.

Both return their metrics as one float32 vector whose first entries `metric_names` names: sums over examples, as the
task gives them. A training step goes on with the auxiliary loss of the model if it has one (see `layers.parameters`),
again as a sum over examples, then the global gradient norm, the learning rate and the number of real tokens.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.parallel.devices import Devices
from experiments.training.model import SplitModel, Vectors
from experiments.training.optimizers import Optimizer
from experiments.training.state import Layouts, TrainState
from layers.typing import Array, Float

Batch = Mapping[str, Array]
AUXILIARY = "auxiliary_loss"
STEP_METRICS = ("gradient_norm", "learning_rate", "tokens")


class StepFunctions:
    """Jitted training and evaluation of one model on one task.

    Attributes:
      metric_names: of the sums that the task gives.
      train_metric_names: of all sums of a training step.
      train: (state, batch) -> (state, metrics). The state is donated.
      evaluate: (parameters, statistics, totals, batch) -> totals + metrics. The totals are donated.
    """

    def __init__(
        self,
        model: SplitModel,
        layouts: Layouts,
        optimizer: Optimizer,
        loss: Callable[[Array, Batch], tuple[Array, dict[str, Array]]],
        *,
        metric_names: tuple[str, ...],
        devices: Devices,
        accumulate: int = 1,
    ):
        """Prepares the functions; nothing is compiled yet.

        Args:
          layouts: of parameters and running statistics in their vectors.
          loss: of the task: outputs and batch to the mean loss and the sums "loss", "count" and others.
          metric_names: the names of those sums.
          accumulate: micro-batches a step.
        """
        self._model, self._loss = model, loss
        self._layout, self._statistics = layouts
        self._optimizer, self._devices, self._accumulate = optimizer, devices, accumulate
        self.metric_names = metric_names
        self.train_metric_names = (*metric_names, *([AUXILIARY] if model.has_auxiliary_loss else []))
        self.train = jax.jit(self._train, donate_argnums=0, out_shardings=devices.replicated)
        self.evaluate = jax.jit(self._evaluate, donate_argnums=2, out_shardings=devices.replicated)

    def zero_totals(self) -> Float[Array, "m"]:
        """The sums over no batch."""
        return self._devices.replicate(np.zeros(len(self.metric_names), np.float32))

    def _train(self, state: TrainState, batch: Batch) -> tuple[TrainState, Float[Array, "m"]]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        gradients, statistics, sums = self._gradients(state, batch, key)
        gradients = {name: gradient / sums["count"] for name, gradient in gradients.items()}
        parameters, moments, norm = self._optimizer.update(
            state.step, state.parameters, gradients, state.moments
        )
        average = state.average
        if average is not None:
            keep = self._optimizer.config.ema
            average = {name: keep * old + (1 - keep) * parameters[name] for name, old in average.items()}
        rate = self._optimizer.config.learning_rate * self._optimizer.schedule(state.step)
        metrics = [*self._ordered(sums, self.train_metric_names), norm, rate, count_tokens(batch)]
        new = TrainState(state.step + 1, parameters, statistics, moments, average, state.key)
        return new, jnp.stack([jnp.asarray(metric, jnp.float32) for metric in metrics])

    def _gradients(
        self, state: TrainState, batch: Batch, key: Array
    ) -> tuple[Vectors, Vectors, dict[str, Array]]:
        """Gradients of the sum of losses, statistics, and the sums of metrics, over all micro-batches."""
        arrays = self._layout.cut(state.parameters)

        def loss(arrays, statistics, batch, key):
            output, statistics = self._model(arrays, statistics, batch, key=key)
            _, sums = self._loss(output, batch)
            if not self._model.has_auxiliary_loss:
                return sums["loss"], (statistics, sums)
            auxiliary = self._model.auxiliary_loss(statistics) * sums["count"]
            return sums["loss"] + auxiliary, (statistics, sums | {AUXILIARY: auxiliary})

        def add_micro_batch(carry, inputs):
            statistics, gradients, sums = carry
            micro_batch, number = inputs
            micro_key = jax.random.fold_in(key, number)
            (_, (statistics, new_sums)), new = jax.value_and_grad(loss, has_aux=True)(
                arrays, self._statistics.cut(statistics), micro_batch, micro_key
            )
            new = self._layout.join(new, jnp), new_sums
            gradients, sums = jax.tree.map(jnp.add, (gradients, sums), new)
            return (self._statistics.join(statistics, jnp), gradients, sums), None

        zeros = (
            jax.tree.map(jnp.zeros_like, state.parameters),
            {name: jnp.zeros((), jnp.float32) for name in self.train_metric_names},
        )
        count = self._accumulate
        if count == 1:
            carry, _ = add_micro_batch((state.statistics, *zeros), (batch, 0))
        else:
            inputs = (self._micro_batches(batch), jnp.arange(count))
            carry, _ = jax.lax.scan(add_micro_batch, (state.statistics, *zeros), inputs)
        statistics, gradients, sums = carry
        return gradients, statistics, sums

    def _micro_batches(self, batch: Batch) -> dict[str, Array]:
        """Every `accumulate`-th row in each micro-batch, so that rows stay on the device that holds them."""

        def cut(array: Array) -> Array:
            array = array.reshape(-1, self._accumulate, *array.shape[1:]).swapaxes(0, 1)
            return jax.lax.with_sharding_constraint(array, self._devices.by_second_axis)

        return {name: cut(array) for name, array in batch.items()}

    def _evaluate(
        self, parameters: Vectors, statistics: Vectors, totals: Float[Array, "m"], batch: Batch
    ) -> Float[Array, "m"]:
        output, _ = self._model(
            self._layout.cut(parameters), self._statistics.cut(statistics), batch, key=None
        )
        _, sums = self._loss(output, batch)
        return totals + jnp.stack(self._ordered(sums, self.metric_names))

    def _ordered(self, sums: dict[str, Array], names: tuple[str, ...]) -> list[Array]:
        return [sums[name] for name in names]


def count_tokens(batch: Batch) -> Array:
    """Real tokens of a batch: not padding."""
    if "segment_ids" in batch:
        return jnp.sum(batch["segment_ids"] != 0)
    inputs = batch["inputs"]
    return jnp.asarray(inputs.shape[0] * inputs.shape[1])


def means(names: tuple[str, ...], sums: np.ndarray) -> dict[str, float]:
    """The averages: over the sum "count", or of a sum called NAME over that called NAME_count if there is one."""
    values = dict(zip(names, map(float, sums), strict=True))
    suffix = "_count"
    counts = {name.removesuffix(suffix): value for name, value in values.items() if name.endswith(suffix)}
    count = values.pop("count")
    return {
        name: value / counts.get(name, count) for name, value in values.items() if not name.endswith(suffix)
    }


def metric_names_of(model: SplitModel, loss: Callable[..., Any], batch: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the sums that a task gives, without computing them.

    Raises:
      ValueError: if "loss" or "count" is not among them.
    """
    _, sums = jax.eval_shape(
        lambda parameters, statistics, batch: loss(model(parameters, statistics, batch, key=None)[0], batch),
        model.parameters,
        model.statistics,
        dict(batch),
    )
    names = tuple(sums)
    if missing := {"loss", "count"} - set(names):
        raise ValueError(f"the task's sums are {', '.join(names)}; they must include {' and '.join(missing)}")
    return names
