"""Metrics of a model over whole splits."""

import time

import numpy as np

from experiments.parallel.mesh import Devices
from experiments.training.batches import ahead
from experiments.training.compilation import PerShape
from experiments.training.experiment import Experiment
from experiments.training.state import TrainState
from experiments.training.step import StepFunctions, means


class Evaluator:
    """Evaluates training states on splits of a task."""

    def __init__(self, experiment: Experiment, functions: StepFunctions, devices: Devices):
        """Creates an evaluator without compiling anything."""
        self._experiment, self._devices, self._functions = experiment, devices, functions
        self._step = PerShape(functions.evaluate)

    @property
    def compile_seconds(self) -> float:
        """Seconds of compilation so far."""
        return self._step.compile_seconds

    def compile(self, state: TrainState, split: str) -> None:
        """Compiles for all batch widths of a split, with a state on the devices."""
        examples = self._experiment.example_batches(split, self._experiment.eval_batch_size)
        self._step.compile(
            state.evaluated,
            state.statistics,
            self._functions.zero_totals(),
            batches=map(self._devices.abstract_batch, examples),
        )

    def __call__(self, state: TrainState, split: str) -> dict[str, float]:
        """Returns averages over the task's examples or labels, their number as "examples", and the "seconds".

        If the state has an average of the parameters, the average is evaluated.
        """
        start = time.perf_counter()
        totals = self._functions.zero_totals()
        part = self._devices.my_rows(self._experiment.eval_batch_size)
        for batch in ahead(self._experiment.eval_batches(split, part), self._devices):
            totals = self._step(state.evaluated, state.statistics, totals, batch)
        sums = np.asarray(totals, np.float64)
        names = self._functions.metric_names
        examples = round(sums[names.index("count")])
        return means(names, sums) | dict(examples=examples, seconds=time.perf_counter() - start)
