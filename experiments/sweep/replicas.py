"""Training several copies of one model at once, which differ in learning rate and in the seed of their parameters.

Small models leave a GPU idle: launching and compiling cost more than computing. All copies are one program (`vmap`)
that takes many steps a call (`scan`), on the same batches in the same order.
"""

import concurrent.futures
import functools
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.config import loading as config_loading
from experiments.config.loading import TrainConfig
from experiments.data import pipeline
from experiments.runs.interrupts import Interrupted
from experiments.tasks import make_task
from experiments.training.model import Layout, SplitModel
from experiments.training.optimizers import Group, Optimizer, OptimizerConfig, assign_groups
from experiments.training.step import means
from seqmodels import build_model

STEPS_AT_ONCE = 50
EVAL_TOKENS = 2**15  # tokens of an evaluation batch, but at least one row


@functools.lru_cache(maxsize=4)
def _task(options: str) -> Any:
    """A task by its options as JSON; jobs of a study share the data that it keeps."""
    values = _tuples(json.loads(options))
    return make_task(values.pop("name"), **values)


class Replicas:
    """Copies of the model of a config, one for each pair of a learning rate and a seed.

    Attributes:
      runs: the pairs, in the order of the copies.
      num_parameters: of one copy.
      compile_seconds: spent on making the program of a training step.
    """

    def __init__(self, config: Mapping[str, Any], rates: Sequence[float], seeds: Sequence[int]):
        """Makes data and parameters, and compiles the training step.

        Args:
          config: plain, see `config_loading.to_plain`. Its seed orders the batches; its learning rate
            is what those of `optimizer.groups` are relative to.

        Raises:
          ValueError: the config makes no sense, or the model has running statistics.
        """
        self._train = config_loading.section(config, "train", TrainConfig)
        optimizer = config_loading.section(config, "optimizer", OptimizerConfig)
        self._task = _task(json.dumps(config["task"]))
        self._config, self.runs = config, [(rate, seed) for rate in rates for seed in seeds]
        if self._train.steps is None:
            raise ValueError("train.steps is None; a sweep counts in steps")
        self._steps_at_once = math.gcd(self._train.steps, STEPS_AT_ONCE)
        models = {seed: self._make(seed) for seed in seeds}
        self._model = models[seeds[0]]
        if self._model.statistics:
            raise ValueError("the model has running statistics; a sweep takes models without")
        self.num_parameters = self._model.num_parameters
        chosen, groups = assign_groups(optimizer, self._model.declared_groups)
        self._layout = Layout.of(self._model.parameters, chosen)
        self._optimizer = Optimizer(optimizer, groups, optimizer.warmup_steps or 0, self._train.steps)
        self._initial = {seed: self._layout.join(model.parameters) for seed, model in models.items()}
        self._chunk = self._compile()

    def _make(self, seed: int) -> SplitModel:
        values = self._config["model"] | {"vocab_size": self._task.vocab_size}
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            return SplitModel(build_model(values, rngs=nnx.Rngs(seed)))

    def _compile(self) -> Any:
        start = time.perf_counter()
        state = jax.eval_shape(self._start)
        rates = jax.ShapeDtypeStruct((len(self.runs),), jnp.float32)
        batches = jax.tree.map(
            lambda array: jax.ShapeDtypeStruct((self._steps_at_once, *array.shape), array.dtype),
            next(self._batches()),
        )
        function = jax.jit(jax.vmap(self._steps, in_axes=(0, 0, None)), donate_argnums=0)
        compiled = function.lower(state, rates, batches).compile()
        self.compile_seconds = time.perf_counter() - start
        return compiled

    def _start(self) -> tuple[Any, ...]:
        """Steps taken, parameters, moments and keys of all copies."""
        vectors = jax.tree.map(
            lambda *arrays: jnp.stack(arrays), *(self._initial[seed] for _, seed in self.runs)
        )
        keys = jnp.stack([jax.random.key_data(jax.random.key(seed)) for _, seed in self.runs])
        return jnp.zeros(len(self.runs), jnp.int32), vectors, jax.vmap(self._optimizer.init)(vectors), keys

    def _batches(self) -> Iterator[dict[str, np.ndarray]]:
        return pipeline.train_iterator(
            self._task.splits["train"],
            batch_size=self._train.batch_size,
            seed=self._config["seed"],
            num_steps=self._train.steps,
            prefetch=0,
        )

    def _steps(
        self, state: tuple[Any, ...], rate: jax.Array, batches: Mapping[str, jax.Array]
    ) -> tuple[Any, Any]:
        """Steps of one copy; returns the state and the losses."""
        scale = rate / self._optimizer.config.learning_rate
        groups = {
            name: Group(scale * group.learning_rate, group.weight_decay)
            for name, group in self._optimizer.groups.items()
        }
        optimizer = Optimizer(
            self._optimizer.config, groups, self._optimizer.warmup_steps, self._optimizer.total_steps
        )

        def loss(vectors, batch, key):
            output, _ = self._model(self._layout.cut(vectors), {}, batch, key=key)
            return self._task.loss(output, batch)[0]

        def step(state, batch):
            number, vectors, moments, data = state
            key = jax.random.fold_in(jax.random.wrap_key_data(data), number)
            value, gradients = jax.value_and_grad(loss)(vectors, batch, key)
            vectors, moments, _ = optimizer.update(number, vectors, gradients, moments)
            return (number + 1, vectors, moments, data), value

        return jax.lax.scan(step, state, batches)

    def train(self, *, deadline: float | None = None) -> dict[str, Any]:
        """Trains all copies from the start.

        Args:
          deadline: of `time.monotonic`.

        Returns:
          "losses" (chunks, copies), means over the steps of each chunk, and "seconds".

        Raises:
          Interrupted: if the deadline passes; nothing is kept.
        """
        rates = jnp.array([rate for rate, _ in self.runs], jnp.float32)
        batches, losses, start = self._batches(), [], time.perf_counter()
        count = self._train.steps // self._steps_at_once
        with concurrent.futures.ThreadPoolExecutor(1) as pool:

            def chunk() -> dict[str, np.ndarray]:
                parts = [next(batches) for _ in range(self._steps_at_once)]
                return {name: np.stack([part[name] for part in parts]) for name in parts[0]}

            state, waiting = self._start(), pool.submit(chunk)
            for number in range(count):
                given = jax.device_put(waiting.result())
                if number + 1 < count:
                    waiting = pool.submit(chunk)
                state, values = self._chunk(state, rates, given)
                losses.append(values.mean(axis=1))
                if number:
                    losses[number - 1].block_until_ready()  # no more than one chunk ahead
                if deadline is not None and time.monotonic() > deadline:
                    raise Interrupted("the time limit")
        self._parameters = state[1]
        return dict(losses=np.stack(jax.device_get(losses)), seconds=time.perf_counter() - start)

    def evaluate(self, split: str) -> list[dict[str, float]]:
        """Metrics of every copy on a split, after training."""
        source = self._task.splits[split]
        rows = max(1, min(len(source), EVAL_TOKENS // int(source.lengths.max())))
        totals: Any = 0
        for batch in pipeline.eval_batches(source, batch_size=rows, prefetch=2):
            sums = self._sums(self._parameters, batch)
            totals = jax.tree.map(jnp.add, totals, sums) if totals else sums
        totals = jax.device_get(totals)
        return [
            means(tuple(totals), np.array([float(value[copy]) for value in totals.values()]))
            for copy in range(len(self.runs))
        ]

    @functools.cached_property
    def _sums(self) -> Any:
        def sums(vectors, batch):
            return self._task.loss(self._model(self._layout.cut(vectors), {}, batch, key=None)[0], batch)[1]

        return jax.jit(jax.vmap(sums, in_axes=(0, None)))


def _tuples(value: Any) -> Any:
    """Lists, as JSON has them, as tuples."""
    if isinstance(value, dict):
        return {name: _tuples(item) for name, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
