"""Long-horizon forecasting of time series, as Informer measures it: a regression."""

import functools
import hashlib
from collections.abc import Mapping
from typing import ClassVar, Literal

import jax.numpy as jnp
import numpy as np

from experiments.data import forecasting
from experiments.data.forecasting import Windows
from experiments.tasks.task import Task
from layers.options import check_integer
from layers.typing import Array, Float

VERSION = 1
RIDGE = 1e-3  # of the linear baseline, per window


class Forecasting(Task):
    """The next steps of a time series from the last ones (Zhou et al. 2021, arXiv:2012.07436).

    The loss is the mean squared error over all windows, steps and values, which are scaled by the deviations of the training
    rows; "absolute_error" is the mean absolute one. Every window of a split counts, also the last ones of a batch that
    Informer's code leaves out.

    Attributes:
      input_size: number of values per step that are given.
      num_classes: number of outputs, `horizon` times the number of values that are asked for.
      splits: "train", "validation" and "test".
      manifest: parameters of the data, with the hash of the series.
    """

    padding = "end"
    packed = False
    selection_metric: ClassVar[tuple[str, str]] = ("loss", "min")

    def __init__(
        self,
        *,
        file: str | None = None,
        values: Literal["all", "one", "all_to_one"] = "all",
        target: str | None = None,
        length: int = 96,
        horizon: int = 24,
    ):
        """Reads the series.

        Args:
          file: a CSV file in the format of ETT, such as ETTh1.csv; None for a stand-in that is drawn from a seed.
          values: "all" values from all, "one" from itself, or "all_to_one"; M, S and MS in Informer's code.
          target: name of the one value; by default the last column, "OT" in ETT.
          length: steps of a window.
          horizon: steps that are asked for.

        Raises:
          ValueError: if a value is invalid, or the file is not in the format; names the row.
        """
        for name, number in dict(length=length, horizon=horizon).items():
            check_integer(f"task.{name}", number, least=1)
        if values not in ("all", "one", "all_to_one"):
            raise ValueError(f"task.values={values!r}; expected all, one or all_to_one")
        series = forecasting.load(file)
        if target is not None and values == "all":
            raise ValueError(f"task.target={target!r} has no effect with task.values='all'; expected None")
        target = series.columns[-1] if target is None else target
        if target not in series.columns:
            raise ValueError(f"task.target={target!r}; {series.name} has {', '.join(series.columns)}")
        everything, one = tuple(range(len(series.columns))), (series.columns.index(target),)
        inputs, targets = dict(all=(everything, everything), one=(one, one), all_to_one=(everything, one))[
            values
        ]
        if horizon * len(targets) < 2:
            raise ValueError(f"task.horizon={horizon} of one value; expected at least 2 numbers to forecast")
        self.input_size, self.num_classes = len(inputs), horizon * len(targets)
        self.splits: dict[str, Windows] = forecasting.split(
            series, length=length, horizon=horizon, inputs=inputs, targets=targets
        )
        digest = hashlib.sha256(series.values.astype("<f8").tobytes()).hexdigest()
        parameters = dict(
            series=series.name,
            sha256=digest,
            values=values,
            target=None if values == "all" else target,
            length=length,
            horizon=horizon,
        )
        self.manifest = {"name": "forecasting", "version": VERSION, "parameters": parameters}

    def loss(
        self, outputs: Float[Array, "b c"], batch: Mapping[str, Array]
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Returns the mean squared error and the sums {"loss", "absolute_error", "count"} over windows."""
        weight = batch["weight"].astype(jnp.float32)
        counted = (weight > 0)[:, None]
        errors = jnp.where(counted, outputs.astype(jnp.float32) - batch["labels"], 0.0)
        sums = {
            "loss": weight @ jnp.mean(jnp.square(errors), axis=1),
            "absolute_error": weight @ jnp.mean(jnp.abs(errors), axis=1),
            "count": jnp.sum(weight),
        }
        return sums["loss"] / jnp.maximum(sums["count"], 1.0), sums

    def baselines(self, split: str = "test") -> dict[str, float]:
        """Returns the loss of repeating the last step, "last", and of the best linear map from windows, "linear".

        The linear map is that of ridge regression on the training windows, for each asked value from its own past (Zeng et al. 2023,
        arXiv:2205.13504).
        """
        windows = self.splits[split]
        places = [windows.inputs.index(target) for target in windows.targets]
        batch = windows.gather(np.arange(len(windows)), windows.length)
        labels = batch["labels"].reshape(len(windows), windows.horizon, len(places))
        past = batch["inputs"][..., places]
        linear = np.stack([_apply(past[..., i], self._linear[i]) for i in range(len(places))], axis=-1)
        return {
            "last": float(np.mean(np.square(labels - past[:, -1:]))),
            "linear": float(np.mean(np.square(labels - linear))),
        }

    @functools.cached_property
    def _linear(self) -> list[np.ndarray]:
        """Weights (length + 1, horizon) for each asked value."""
        train = self.splits["train"]
        batch = train.gather(np.arange(len(train)), train.length)
        labels = batch["labels"].reshape(len(train), train.horizon, -1)
        found = []
        for i, target in enumerate(train.targets):
            past = _with_one(batch["inputs"][..., train.inputs.index(target)])
            matrix = past.T @ past + RIDGE * len(train) * np.eye(past.shape[1])
            found.append(np.linalg.solve(matrix, past.T @ labels[..., i]))
        return found


def _with_one(past: np.ndarray) -> np.ndarray:
    return np.concatenate([past, np.ones_like(past[:, :1])], axis=1).astype(np.float64)


def _apply(past: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return _with_one(past) @ weights
