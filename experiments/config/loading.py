"""Experiment configs as plain data: their sections, the checks that need no compute, and their differences."""

import dataclasses
import fnmatch
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from layers.kernels.sequence_parallel import AttentionMethod, StateMethod
from layers.options import Count, Positive, checked_dataclass
from layers.registry import make_config, suggestion

SECTIONS = ("seed", "task", "model", "optimizer", "train", "data", "mesh")
OPTIONAL_SECTIONS = ("data", "mesh")

# Patterns of fields that determine what is shown or kept, where data are stored and how work is divided, but not what is
# computed: a run resumes with other values. The content of data is compared by its manifest instead.
FREE_FIELDS = (
    "mesh",
    "mesh.*",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_last",
    "train.tensorboard",
    "train.wandb",
    "train.protocol",
    "data.prefetch",
    "task.data_dir",
    "task.official_dir",
    "task.tfds_dir",
    "task.workers",
)


@checked_dataclass(section="train")
class TrainConfig:
    """The section `train`.

    Attributes:
      batch_size: number of examples per step, over all devices and micro-batches.
      epochs: length of training in epochs; alternative to `steps`.
      steps: length of training in steps.
      accumulate: number of micro-batches per step, computed sequentially to save memory.
      eval_every: number of epochs between evaluations on the validation split; one always follows the last step.
      eval_batch_size: number of examples per evaluation batch; `batch_size` if None.
      log_every: number of steps between lines of the log.
      checkpoint_every: number of steps between checkpoints in addition to those after evaluations; None for only those.
      keep_last: number of newest checkpoints kept besides the best.
      tensorboard: whether TensorBoard event files are written.
      wandb: Weights & Biases project to report to, or None.
      pretrained: folder of a published checkpoint, or its identifier, whose language model is trained further; the section `model`
        then needs nothing but its options of training (see `experiments.config.pretrained`).
      lora: options of adapters, such as rank (see `seqmodels.LoraConfig`), which are then trained in place of the parameters of
        `pretrained`; None trains these. Checkpoints hold the adapters alone.
      distill: options of distillation, such as the teacher (see `experiments.training.distillation`); None for the task's loss alone.
      protocol: name of the published protocol that the config follows, such as "s4", by which `experiments.report` keeps
        figures apart; it changes nothing.
    """

    batch_size: int
    epochs: int | None = None
    steps: int | None = None
    accumulate: int = 1
    eval_every: Positive = 1
    eval_batch_size: int | None = None
    log_every: int = 50
    checkpoint_every: int | None = None
    keep_last: int = 2
    tensorboard: bool = True
    wandb: str | None = None
    pretrained: str | None = None
    lora: Mapping[str, Any] | None = None
    distill: Mapping[str, Any] | None = None
    protocol: str | None = None

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(
                f"train.epochs={self.epochs} and train.steps={self.steps}; set one of the two and leave the other None"
            )
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"train.accumulate={self.accumulate} does not divide train.batch_size={self.batch_size}"
            )
        if self.lora is not None and self.pretrained is None:
            raise ValueError(
                f"train.lora={dict(self.lora)} without train.pretrained; expected the folder of a published checkpoint too"
            )
        if self.distill is not None and self.pretrained is not None:
            raise ValueError(
                f"train.pretrained={self.pretrained!r} with train.distill; expected the folder as train.distill.start"
            )


@checked_dataclass(section="data")
class DataConfig:
    """The section `data`.

    Attributes:
      bucket_bounds: widths that batches are padded to, increasing; None pads to the longest sequence.
      prefetch: number of batches prepared ahead of their use.
    """

    bucket_bounds: tuple[int, ...] | None = None
    prefetch: Count = 8


@checked_dataclass(section="mesh")
class MeshConfig:
    """The section `mesh`: the number of devices per mesh axis; -1, in at most one axis, takes the remaining ones.

    Attributes:
      data: size of the axis that batches are sharded over, with replicated parameters. None is -1 if no other axis is -1,
        or else 1.
      fsdp: size of the axis that batches, parameters and the optimizer's state are sharded over.
      tensor: size of the axis that heads and hidden channels are sharded over.
      sequence: size of the axis that time is sharded over.
      expert: size of the axis that the experts of mixtures are sharded over.
      method: how attention sees the keys of other devices where time is sharded: "all_gather" (every device gathers keys and
        values), "ulysses" (devices exchange time for heads), "ring" (keys and values visit every device), "zigzag" (they
        do, and causal work is dealt out evenly), "balanced_ring" (they do, and devices that would wait help others),
        "token_ring" (queries visit every device), "score_ring" (first keys and then values visit, for whole rows of scores)
        or "partitioned" (the compiler partitions attention as it finds best); see `layers.kernels.attention.over_time`.
      states: how the states of recurrences cross the cuts of time: "all_gather" (every device gathers one summary of each
        part) or "all_scan" (they flow from device to device in blocks); see `layers.kernels.all_scan`.
      otherwise: what becomes of mixers without a form over time: "refused", or "partitioned" (the compiler partitions what one
        device would do, exactly, but maybe with whole rows on every device).
    """

    data: int | Literal[-1] | None = None
    fsdp: int | Literal[-1] = 1
    tensor: int | Literal[-1] = 1
    sequence: int | Literal[-1] = 1
    expert: int | Literal[-1] = 1
    method: AttentionMethod = "all_gather"
    states: StateMethod = "all_gather"
    otherwise: Literal["refused", "partitioned"] = "refused"

    def __post_init__(self) -> None:
        words = "method", "states", "otherwise"
        sizes = {n: size for n, size in dataclasses.asdict(self).items() if n not in words}
        if self.data is None:
            data = 1 if -1 in sizes.values() else -1
            sizes["data"] = data
            object.__setattr__(self, "data", data)
        if len(open_axes := [f"mesh.{name}" for name, size in sizes.items() if size == -1]) > 1:
            raise ValueError(
                f"{' and '.join(open_axes)} are -1; only one axis can take the devices that are left"
            )


def to_plain(config: Any) -> dict[str, Any]:
    """Returns the config (a ConfigDict or mapping) as nested dicts of tuples and JSON scalars.

    Raises:
      TypeError: a value cannot be stored as JSON; names the field.
      ValueError: an unknown or missing section.
    """
    plain = _plain(config.to_dict() if hasattr(config, "to_dict") else config, "config")
    for section in plain:
        if section not in SECTIONS:
            raise ValueError(
                f"config has an unknown section {section!r}{suggestion(section, SECTIONS)}; "
                f"sections: {', '.join(SECTIONS)}"
            )
    for section in OPTIONAL_SECTIONS:
        plain.setdefault(section, {})
    for section in SECTIONS:
        if section not in plain:
            raise ValueError(f"config has no {section!r}; sections: {', '.join(SECTIONS)}")
        if section != "seed" and not isinstance(plain[section], dict):
            raise TypeError(f"config.{section}={plain[section]!r}; expected a dict")
    if (
        isinstance(plain["seed"], bool)
        or not isinstance(plain["seed"], int)
        or not 0 <= plain["seed"] < 2**32
    ):
        raise ValueError(f"config.seed={plain['seed']!r}; expected an integer from 0 to 2**32 - 1")
    return plain


def _plain(value: Any, name: str) -> Any:
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{name} has the key {key!r}; keys must be strings")
        return {key: _plain(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_plain(item, f"{name}[{i}]") for i, item in enumerate(value))
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}={value}; numbers must be finite")
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(
        f"{name}={value!r} is a {type(value).__name__}; "
        "a config holds numbers, strings, booleans, None, tuples and dicts"
    )


def to_json(config: Mapping[str, Any]) -> str:
    """Returns the JSON text of a plain config, which `from_json` reads."""
    return json.dumps(config, indent=2) + "\n"


def from_json(text: str) -> dict[str, Any]:
    """Returns the plain config in a text from `to_json`."""
    return to_plain(json.loads(text))


def section(config: Mapping[str, Any], name: str, config_class: type) -> Any:
    """Returns the section `name` as the dataclass `config_class`; errors suggest the nearest field."""
    return make_config(f"config.{name}", config_class, config.get(name, {}))


def differences(
    run: Mapping[str, Any], given: Mapping[str, Any], *, ignore: tuple[str, ...] = FREE_FIELDS
) -> list[str]:
    """Returns the fields that differ between the config of a run and a given one, one line per field.

    Args:
      ignore: patterns of fields that may differ.
    """
    old, new = dict(_flatten(run)), dict(_flatten(given))
    names = [
        name
        for name in sorted(old.keys() | new.keys())
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in ignore)
    ]
    absent = object()

    def show(config: Mapping[str, Any], name: str) -> str:
        return repr(config[name]) if name in config else "not set"

    return [
        f"config.{name}: {show(old, name)} in the run, {show(new, name)} given"
        for name in names
        if old.get(name, absent) != new.get(name, absent)
    ]


def _flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
