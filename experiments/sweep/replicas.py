"""Simultaneous training of copies of one model that differ in learning rate and parameter seed.

Small models leave a GPU idle: launching and compiling cost more than computing. All copies are one program (`vmap`) that
takes many steps per call (`scan`), on the same batches in the same order.
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

from experiments.config import loading as config_loading
from experiments.config.loading import TrainConfig
from experiments.config.models import sizes_of, with_sizes
from experiments.data import pipeline
from experiments.parallel.mesh import Devices
from experiments.runs.interrupts import Interrupted
from experiments.tasks import make_task
from experiments.training.model import SplitModel
from experiments.training.optimizers import Optimizer, OptimizerConfig
from experiments.training.state import TrainState
from experiments.training.step import StepFunctions, means, metric_names_of
from seqmodels import build_model

STEPS_AT_ONCE = 50
EVAL_TOKENS = 2**15  # number of tokens per evaluation batch, with at least one row


@functools.lru_cache(maxsize=4)
def _task(options: str) -> Any:
    """Returns a task by its options as JSON; jobs of a study share its cached data."""
    values = _tuples(json.loads(options))
    return make_task(values.pop("name"), **values)


class Replicas:
    """Copies of the model of a config, one per pair of a learning rate and a seed.

    Attributes:
      runs: pairs of learning rate and seed, in the order of the copies.
      num_parameters: number of parameters per copy.
      compile_seconds: seconds spent compiling the training step.
    """

    def __init__(self, config: Mapping[str, Any], rates: Sequence[float], seeds: Sequence[int]):
        """Creates data and parameters, and compiles the training step.

        Args:
          config: plain config, see `loading.to_plain`. Its seed orders the batches; the rates of `optimizer.groups` are
            relative to its learning rate.

        Raises:
          ValueError: the config is invalid.
        """
        self._train = config_loading.section(config, "train", TrainConfig)
        optimizer = config_loading.section(config, "optimizer", OptimizerConfig)
        self._task = _task(json.dumps(config["task"]))
        self._config, self.runs = config, [(rate, seed) for rate in rates for seed in seeds]
        if self._train.pretrained is not None:
            raise ValueError(
                f"train.pretrained={self._train.pretrained!r}; a sweep of rates trains from random parameters, use --file"
            )
        if self._train.distill is not None:
            raise ValueError("train.distill is given; a sweep of rates trains on the task's loss, use --file")
        if self._train.steps is None:
            raise ValueError("train.steps is None; a sweep counts in steps")
        self._steps_at_once = math.gcd(self._train.steps, STEPS_AT_ONCE)
        values = with_sizes(config, sizes_of(self._task))
        model = SplitModel(
            lambda rngs: build_model(values, rngs=rngs),
            padding=self._task.padding,
            packed=self._task.packed,
            unprojected=self._task.unprojected,
        )
        self.num_parameters = model.num_parameters
        self._rate = optimizer.learning_rate
        rule = Optimizer(optimizer, model.parameters, optimizer.warmup_steps or 0, self._train.steps)
        batch = next(self._batches())
        self._functions = StepFunctions(
            model,
            rule,
            self._task.loss,
            metric_names=metric_names_of(model, self._task.loss, batch),
            devices=Devices(jax.local_devices()[:1]),
            accumulate=self._train.accumulate,
        )
        self._chunk = self._compile()

    def _compile(self) -> Any:
        start = time.perf_counter()
        state = jax.eval_shape(self._start, self._keys())
        rates = jax.ShapeDtypeStruct((len(self.runs),), jnp.float32)
        batches = jax.tree.map(
            lambda array: jax.ShapeDtypeStruct((self._steps_at_once, *array.shape), array.dtype),
            next(self._batches()),
        )
        function = jax.jit(jax.vmap(self._steps, in_axes=(0, 0, None)), donate_argnums=0)
        compiled = function.lower(state, rates, batches).compile()
        self.compile_seconds = time.perf_counter() - start
        return compiled

    def _keys(self) -> jax.Array:
        """Returns the key of each copy."""
        return jnp.stack([jax.random.key(seed) for _, seed in self.runs])

    def _start(self, keys: jax.Array) -> TrainState:
        """Returns the initial states of all copies, stacked."""
        return jax.vmap(self._functions.layout.make)(keys)

    def _batches(self) -> Iterator[dict[str, np.ndarray]]:
        return pipeline.train_iterator(
            self._task.splits["train"],
            batch_size=self._train.batch_size,
            seed=self._config["seed"],
            num_steps=self._train.steps,
            prefetch=0,
        )

    def _steps(
        self, state: TrainState, rate: jax.Array, batches: Mapping[str, jax.Array]
    ) -> tuple[TrainState, tuple[jax.Array, jax.Array]]:
        """Runs steps of one copy; returns the state, and the loss of each step and whether its batch had a label."""
        names = self._functions.train_metric_names

        def step(state, batch):
            state, metrics = self._functions.step(state, batch, rate / self._rate)
            sums = dict(zip(names, metrics, strict=False))
            labelled = sums["count"] > 0
            loss = jnp.where(labelled, sums["loss"] / jnp.where(labelled, sums["count"], 1.0), 0.0)
            return state, (loss, labelled)

        return jax.lax.scan(step, state, batches)

    def train(self, *, deadline: float | None = None) -> dict[str, Any]:
        """Trains all copies from the start and returns their losses.

        Args:
          deadline: time of `time.monotonic` at which training stops.

        Returns:
          "losses" (chunks, copies), means over the steps with a label per chunk, and "seconds".

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

            state, waiting = jax.jit(self._start)(self._keys()), pool.submit(chunk)
            for number in range(count):
                given = jax.device_put(waiting.result())
                if number + 1 < count:
                    waiting = pool.submit(chunk)
                state, (values, labelled) = self._chunk(state, rates, given)
                losses.append(values.sum(axis=1) / jnp.maximum(labelled.sum(axis=1), 1))
                if number:
                    losses[number - 1].block_until_ready()  # at most one chunk ahead
                if deadline is not None and time.monotonic() > deadline:
                    raise Interrupted("the time limit")
        self._trained = state
        return dict(losses=np.stack(jax.device_get(losses)), seconds=time.perf_counter() - start)

    def baselines(self, split: str) -> dict[str, float]:
        """Returns the metrics of the task's trivial predictors on a split."""
        return self._task.baselines(split)

    def evaluate(self, split: str) -> list[dict[str, float]]:
        """Returns the metrics of each copy on a split, after training.

        Raises:
          ValueError: the split has no example.
        """
        source = self._task.splits[split]
        if not len(source):
            raise ValueError(f"the split {split!r} has no example")
        rows = max(1, min(len(source), EVAL_TOKENS // int(source.lengths.max())))
        names = self._functions.metric_names
        totals = jnp.zeros((len(self.runs), len(names)))
        for batch in pipeline.eval_batches(source, batch_size=rows, prefetch=2):
            totals = self._sums(self._trained, totals, batch)
        return [means(names, np.asarray(row, np.float64)) for row in totals]

    @functools.cached_property
    def _sums(self) -> Any:
        def sums(state, totals, batch):
            return self._functions.add_evaluation(state.evaluated, state.statistics, totals, batch)

        return jax.jit(jax.vmap(sums, in_axes=(0, 0, None)))


def _tuples(value: Any) -> Any:
    """Returns a JSON value with tuples in place of lists."""
    if isinstance(value, dict):
        return {name: _tuples(item) for name, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
