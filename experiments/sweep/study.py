"""A study: jobs that are trained one after the other, each a config with changed fields at several learning rates and seeds."""

import dataclasses
import math
import runpy
from collections.abc import Mapping
from typing import Any

from experiments.config.files import shipped
from experiments.config.loading import to_plain


@dataclasses.dataclass(frozen=True)
class Job:
    """Runs that differ only in learning rate and seed.

    Attributes:
      row: name of the row in the table, usually the mixer.
      config: name of a file in configs/synthetic and, after a colon, its arguments.
      changes: changed values of config fields, by path.
      rates, seeds: learning rates and seeds of the runs.
      columns: what each column of the table shows: the study's metric on a split, or "SPLIT:METRIC", another one.
    """

    row: str
    config: str
    changes: Mapping[str, Any]
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    columns: Mapping[str, str]

    def plain_config(self) -> dict[str, Any]:
        """Returns the config with its changes."""
        name, _, arguments = self.config.partition(":")
        file = shipped()[f"configs/synthetic/{name}.py"]
        config = to_plain(runpy.run_path(str(file))["get_config"](arguments))
        config["train"] |= {"epochs": None, "steps": 1}
        for path, value in self.changes.items():
            *parents, last = path.split(".")
            section = config
            for parent in parents:
                section = section[parent]
            section[last] = value
        return config


@dataclasses.dataclass(frozen=True)
class Study:
    """Jobs, and how their results are shown.

    Attributes:
      title: title of the table and the plot.
      jobs: jobs to run.
      metric: metric in the cells, whose validation chooses the rate.
      chance: metric of guessing.
      average: whether a column with the mean of the others is added.
      axis: name of the columns, if they are numbers to draw curves against.
      merged: whether columns that share what is before ": " are shown as one, with their mean.
      lower: whether less is better; then cells are not in percent.
      beside: trivial predictors of the task to show in rows of their own: the names of their metrics, with {} for the column.
    """

    title: str
    jobs: tuple[Job, ...]
    chance: float | None = None
    metric: str = "accuracy"
    average: bool = False
    axis: str | None = None
    merged: bool = False
    lower: bool = False
    beside: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def place(self, job: Job, column: str) -> tuple[str, str]:
        """Returns the split and the metric of a column."""
        split, _, metric = job.columns[column].partition(":")
        return split, metric or self.metric

    def score(self, value: float | None) -> float:
        """Returns the value of the metric, larger for better; one that is not finite is the worst."""
        if value is None or not math.isfinite(value):
            return -math.inf
        return -value if self.lower else value

    def shown(self, value: float) -> str:
        """Returns the value of the metric as text, in percent unless it is a loss."""
        return f"{value:.3f}" if self.lower else f"{100 * value:.1f}"
