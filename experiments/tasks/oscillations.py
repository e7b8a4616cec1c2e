"""Frequency and damping of oscillations that are observed at irregular times: a regression."""

import functools
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np

from experiments.data import oscillations
from experiments.data.oscillations import Oscillations
from experiments.tasks.task import Task
from layers.options import check_integer
from layers.typing import Array, Float

GAPS = ("steps", "feature", "none")


class IrregularOscillations(Task):
    """Frequency and damping of an oscillation from noisy values at irregular times, as S5's pendulum (arXiv:2208.04933).

    Values alone do not tell them: every signal has its own rate of observations. The times between observations are given to
    the mixers as the lengths of their steps, as a second input, or not at all. The loss is the mean squared error of the two,
    each of variance 1, so that their means give 1.

    Attributes:
      input_size: 1, or 2 with `gaps="feature"`.
      num_classes: number of outputs, 2.
      splits: "train", "validation" and "test".
      manifest: parameters of the data.
    """

    num_classes = 2
    makes_no_data: ClassVar[bool] = True
    padding = "end"
    packed = False
    selection_metric: ClassVar[tuple[str, str]] = ("loss", "min")

    def __init__(
        self,
        *,
        gaps: Literal["steps", "feature", "none"] = "steps",
        length: int = 64,
        train: int = 8000,
        validation: int = 500,
        test: int = 1000,
        seed: int = 0,
    ):
        """Creates the task; the signals are drawn when they are first asked for.

        Args:
          gaps: how the times between observations are given: "steps", to mixers that take them; "feature" or "none".
          length: number of observations of a signal.
          train: number of signals in that split; likewise `validation` and `test`.
          seed: seed of all draws.

        Raises:
          ValueError: if a value is invalid.
        """
        if gaps not in GAPS:
            raise ValueError(f"task.gaps={gaps!r} is unknown; choose from {', '.join(GAPS)}")
        self._counts = dict(train=train, validation=validation, test=test)
        check_integer("task.length", length, least=2)
        for name, value in self._counts.items():
            check_integer(f"task.{name}", value, least=1)
        check_integer("task.seed", seed, least=0)
        self.input_size = 2 if gaps == "feature" else 1
        self._options = dict(gaps=gaps, length=length, seed=seed)

    @functools.cached_property
    def splits(self) -> dict[str, Oscillations]:
        """All splits by name."""
        return {
            split: oscillations.generate(count, split=split, **self._options)
            for split, count in self._counts.items()
        }

    @property
    def manifest(self) -> dict[str, Any]:
        """The parameters of the data."""
        parameters = self._counts | self._options
        return {"name": "oscillations", "version": oscillations.VERSION, "parameters": parameters}

    def loss(
        self, outputs: Float[Array, "b c"], batch: Mapping[str, Array]
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Returns the mean squared error and the sums {"loss", "frequency", "damping", "count"} of squared errors."""
        weight = batch["weight"].astype(jnp.float32)
        counted = (weight > 0)[:, None]
        errors = jnp.where(counted, jnp.square(outputs.astype(jnp.float32) - batch["labels"]), 0.0)
        frequency, damping = weight @ errors
        sums = {
            "loss": (frequency + damping) / 2,
            "frequency": frequency,
            "damping": damping,
            "count": jnp.sum(weight),
        }
        return sums["loss"] / jnp.maximum(sums["count"], 1.0), sums

    def baselines(self, split: str = "test") -> dict[str, float]:
        """Returns the loss of the mean of the training labels, "mean"."""
        labels = {name: self.splits[name].parameters for name in ("train", split)}
        return {"mean": float(np.mean(np.square(labels[split] - labels["train"].mean(axis=0))))}
