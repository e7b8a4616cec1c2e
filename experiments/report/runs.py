"""Run directories as a report reads them: what was trained on what, and how it went."""

import dataclasses
import functools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.config.command_line import ArgumentError
from experiments.runs.directory import RunDirectory
from experiments.runs.files import DamagedFileError

# Options of tasks that change neither the data's distribution nor its size.
PLACES = ("name", "official_dir", "tfds_dir", "data_dir", "workers", "seed")
# The tasks of Long Range Arena: the option that says what inputs are, its default, and its value in each protocol.
INPUTS = {
    "imdb": ("vocabulary", "characters", {"s4": "characters", "lra": "bytes"}),
    "aan": ("vocabulary", "characters", {"s4": "characters", "lra": "bytes"}),
    "cifar10": ("inputs", "grey", {"s4": "grey", "lra": "tokens"}),
    "pathfinder": ("inputs", "values", {"s4": "values", "lra": "tokens"}),
}
NAMES = {"listops": "ListOps", "imdb": "Text", "aan": "Retrieval", "cifar10": "Image"}
SIZES = {32: "Pathfinder", 128: "Path-X", 256: "Path-256"}

# What the tables and plots read of results.json.
RESULTS = (
    "selection",
    "best_step",
    "validation",
    "test",
    "steps",
    "steps_per_epoch",
    "parameters",
    "tokens_per_second",
    "training_seconds",
    "compile_seconds",
    "devices",
)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run, finished or not.

    Attributes:
      name: its folder, relative to the folder that was given.
      config: plain config.
      results: content of results.json; None if the run is not finished.
      lines: lines of its log.
    """

    name: str
    config: Mapping[str, Any]
    results: Mapping[str, Any] | None
    lines: Sequence[Mapping[str, Any]]

    @property
    def protocol(self) -> str | None:
        """The protocol that the config states, or None."""
        return self.config["train"].get("protocol")

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return self.config["seed"]

    @functools.cached_property
    def model(self) -> str:
        """The mixers of the model, in the order of its pattern, by the names of the config."""
        pattern = self.config["model"].get("pattern", ("model",))
        return "/".join(dict.fromkeys(entry.partition("+")[0] for entry in pattern))

    @functools.cached_property
    def task(self) -> str:
        """The task; a task of Long Range Arena by its name there, and what differs from it in brackets."""
        options = dict(self.config["task"])
        name = options["name"]
        other = {key: value for key, value in options.items() if key not in PLACES and value is not None}
        label = NAMES.get(name, name)
        if name == "pathfinder":
            label = SIZES.get(other.pop("size", 32), label)
        if name == "listops" and other.get("preset") in ("full", "none"):
            del other["preset"]
        if name in INPUTS:
            option, default, wanted = INPUTS[name]
            given = other.pop(option, default)
            if given != wanted.get(self.protocol or ""):
                other[option] = given
        shown = ", ".join(f"{key}={value}" for key, value in sorted(other.items()))
        return f"{label} ({shown})" if shown else label

    @functools.cached_property
    def recipe(self) -> str:
        """The config without its seed and what changes no result, as text: runs with equal ones differ in the seed alone."""
        config = {name: value for name, value in self.config.items() if name not in ("seed", "mesh", "data")}
        config["task"] = {k: v for k, v in config["task"].items() if k not in PLACES}
        kept = ("batch_size", "epochs", "steps", "protocol")
        config["train"] = {k: v for k, v in config["train"].items() if k in kept}
        return json.dumps(config, sort_keys=True)

    @property
    def metric(self) -> str:
        """The metric that chooses the best checkpoint."""
        return "accuracy" if self.results is None else self.results["selection"][0]

    @property
    def test(self) -> float | None:
        """The metric on the test split, at the best checkpoint of validation; None without a finite one."""
        found = None if self.results is None else (self.results["test"] or {}).get(self.metric)
        return found if found is not None and math.isfinite(found) else None

    @property
    def best_validation(self) -> float | None:
        """The metric on the validation split at that checkpoint, or the newest one of a run that is not finished."""
        if self.results is not None:
            return self.results["validation"].get(self.metric)
        return self.curve[-1][1] if self.curve else None

    @functools.cached_property
    def curve(self) -> list[tuple[float, float, float]]:
        """Epoch, validation metric and seconds of training so far, for each evaluation."""
        steps = [
            (line["step"], line["seconds"])
            for line in self.lines
            if line["kind"] == "train" and line.get("seconds") is not None
        ]
        points = []
        for line in self.lines:
            value = line.get(self.metric)
            if line["kind"] == "validation" and value is not None and "epoch" in line:
                seconds = float(np.interp(line["step"], *zip(*steps))) if steps else math.nan
                points.append((line["epoch"], value, seconds))
        return points

    def at_epoch(self, epoch: float) -> float | None:
        """Returns the metric of the last evaluation up to an epoch; None if the run has not come so far."""
        reached = [value for at, value, _ in self.curve if at <= epoch + 1e-6]
        return reached[-1] if reached and self.curve[-1][0] >= epoch - 1e-6 else None


def read(places: Iterable[Path]) -> list[Run]:
    """Returns the runs in some folders: each is a run directory, or holds run directories at any depth.

    Raises:
      ArgumentError: if a place is neither.
      DamagedFileError: if a file of a run is damaged.
    """
    runs: dict[Path, Run] = {}
    for place in places:
        if not place.is_dir():
            raise ArgumentError(f"{place} is no folder; give run directories, or folders with them")
        found = [place] if _is_run(place) else sorted(p.parent for p in place.rglob("config.json"))
        found = [folder for folder in found if _is_run(folder)]
        if not found:
            raise ArgumentError(
                f"{place} is no run directory and holds none: a run directory has config.json and the log metrics.jsonl or a "
                "folder checkpoints, as experiments.train makes them"
            )
        for folder in found:
            name = folder.name if folder == place else folder.relative_to(place).as_posix()
            runs.setdefault(folder.resolve(), _read(folder, name))
    return list(runs.values())


def _is_run(folder: Path) -> bool:
    beside = ("metrics.jsonl", "checkpoints", "results.json")
    return (folder / "config.json").is_file() and any((folder / name).exists() for name in beside)


def _read(folder: Path, name: str) -> Run:
    directory = RunDirectory(folder)
    results = directory.results()
    if missing := [field for field in RESULTS if results is not None and field not in results]:
        raise DamagedFileError(
            f"{folder / 'results.json'} has no {missing[0]!r}; delete it, and experiments.train writes it anew"
        )
    return Run(name, directory.config(), results, directory.log())
