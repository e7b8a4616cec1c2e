"""Experiments: task, model, optimizer and batches of a config."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np

from experiments.config import loading as config_loading
from experiments.config.loading import DataConfig, MeshConfig, TrainConfig
from experiments.config.models import (
    abstract_model,
    adapted,
    check_kind,
    check_model,
    check_positions,
    sizes_of,
    sizes_without_data,
    with_sizes,
)
from experiments.data import bucketing, pipeline
from experiments.parallel.mesh import Devices
from experiments.parallel.over_time import check_mixers
from experiments.tasks import TASKS, make_task
from experiments.tasks.task import Task
from experiments.training.distillation import DistillConfig
from experiments.training.model import SplitModel
from experiments.training.optimizers import Optimizer, OptimizerConfig
from experiments.training.published import read_arrays
from experiments.training.step import StepFunctions, metric_names_of
from experiments.training.teacher import Source, Teacher, check_teacher, open_source
from layers.registry import make_config, suggestion
from seqmodels import build_model


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A task, a model and its training.

    Attributes:
      config: plain config of the experiment.
      train, data, mesh: sections of the config.
      steps_per_epoch: number of full batches per pass over the training split.
      eval_interval: number of steps between evaluations.
      metric_names: names of the task's sums.
      values: what `seqmodels.build_model` makes the model of.
      distill: options of distillation; None for the task's loss.
    """

    config: Mapping[str, Any]
    train: TrainConfig
    data: DataConfig
    mesh: MeshConfig
    task: Task
    model: SplitModel
    optimizer: Optimizer
    steps_per_epoch: int
    metric_names: tuple[str, ...]
    values: Mapping[str, Any]
    distill: DistillConfig | None = None

    @property
    def groups_table(self) -> str:
        """The optimizer's groups as a readable table."""
        return self.optimizer.table()

    @property
    def total_steps(self) -> int:
        return self.optimizer.total_steps

    @property
    def eval_interval(self) -> int:
        return max(1, round(self.train.eval_every * self.steps_per_epoch))

    @property
    def eval_batch_size(self) -> int:
        return self.train.eval_batch_size or self.train.batch_size

    @property
    def selection(self) -> tuple[str, str]:
        """The validation metric that chooses the best checkpoint, and "max" or "min"."""
        default = ("accuracy", "max") if "accuracy" in self.metric_names else ("loss", "min")
        return getattr(self.task, "selection_metric", default)

    def score(self, metrics: Mapping[str, float]) -> float:
        """Returns the selection metric of a validation, negated if lower is better."""
        name, direction = self.selection
        return metrics[name] if direction == "max" else -metrics[name]

    def train_batches(self, part: tuple[int, int] = (0, 1)) -> Any:
        """Returns the iterator over training batches, or over part (index, number of parts) of their rows."""
        return pipeline.train_iterator(
            self.task.splits["train"],
            batch_size=self.train.batch_size,
            bucket_bounds=self.data.bucket_bounds,
            seed=self.config["seed"],
            num_steps=self.total_steps,
            host_index=part[0],
            host_count=part[1],
            prefetch=self.data.prefetch,
            sizes=sizes_of(self.task),
        )

    def eval_batches(self, split: str, part: tuple[int, int] = (0, 1)) -> Iterable[Any]:
        """Returns the batches of one pass over a split, or part (index, number of parts) of their rows.

        Raises:
          ValueError: if the task has no such split.
        """
        if split not in self.task.splits:
            raise ValueError(f"the task has no split {split!r}; it has {', '.join(self.task.splits)}")
        self.check_split(split)
        return pipeline.eval_batches(
            self.task.splits[split],
            batch_size=self.eval_batch_size,
            bucket_bounds=self.data.bucket_bounds,
            host_index=part[0],
            host_count=part[1],
            prefetch=self.data.prefetch,
            sizes=sizes_of(self.task),
        )

    def check_split(self, split: str) -> None:
        """Raises ValueError unless the rows of a split fit the buckets and the model's table of positions."""
        lengths = self.task.splits[split].lengths
        bucketing.check_bucket_bounds(lengths, self.data.bucket_bounds)
        if not self.task.packed:
            check_positions(self.config, split, lengths)

    def example_batches(self, split: str, batch_size: int) -> list[dict[str, np.ndarray]]:
        """Returns one batch per width that batches of an evaluation on a split can have."""
        return pipeline.example_batches(self.task.splits[split], batch_size, self.data.bucket_bounds)

    def example_train_batches(self) -> list[dict[str, np.ndarray]]:
        """Returns one batch per width that batches of training can have."""
        return pipeline.example_train_batches(
            self.task.splits["train"], self.train.batch_size, self.data.bucket_bounds
        )

    def baselines(self, split: str) -> dict[str, float]:
        """Returns the metrics of the task's trivial predictors; empty if it has none."""
        return self.task.baselines(split)

    def check_devices(self, devices: Devices) -> None:
        """Raises ValueError unless the devices divide the batches, in rows and time, the heads, experts, and mixers over time."""
        devices.check_rows("train.batch_size", self.train.batch_size, self.train.accumulate)
        devices.check_rows("train.eval_batch_size", self.eval_batch_size)
        for name, (_, options) in self.model.mixers.items():
            devices.check_heads(name, options)
        devices.check_experts(self.model.parameters | self.model.statistics)
        if devices.mesh.shape["sequence"] > 1:
            if self.task.has_source:
                raise ValueError(
                    f"mesh.sequence={devices.mesh.shape['sequence']} divides the time of rows, and rows of the task "
                    f"{self.config['task']['name']!r} are pairs of a source and a target; expected mesh.sequence=1"
                )
            for batch in self.example_train_batches():
                if "positions" in batch:
                    raise ValueError(
                        f"mesh.sequence={devices.mesh.shape['sequence']} divides the time of rows, and task.extent leaves gaps between "
                        "their positions; expected mesh.sequence=1"
                    )
                devices.check_time("a training batch", _tokens(batch["inputs"]))
                check_mixers(devices, self.model.mixers, len(batch["inputs"]), _tokens(batch["inputs"]))
            for split in self.task.splits.keys() - {"train"}:
                for batch in self.example_batches(split, self.eval_batch_size):
                    devices.check_time(f"a batch of {split}", _tokens(batch["inputs"]))

    def extension_problem(self, run: Mapping[str, Any], newest: int) -> str | None:
        """Returns why a run cannot go on with the number of steps of this experiment; None if it can.

        It can if it then equals, step by step, a run that had this number from its start: more steps with the schedules
        "constant" and "rsqrt", and with "wsd" before its decay. "cosine" depends on the number of steps throughout.

        Args:
          run: config of the run.
          newest: newest step with a checkpoint.
        """
        train = config_loading.section(run, "train", TrainConfig)
        before, now = train.steps or train.epochs * self.steps_per_epoch, self.total_steps
        if now == before:
            return None
        if now < before:
            return f"a run can be extended, not shortened: it has {before} steps, and {now} are given"
        options = self.optimizer.config
        if options.schedule == "cosine":
            return (
                "with optimizer.schedule='cosine' the learning rates depend on the number of steps, so the run cannot be "
                "extended; train anew in another workdir (runs with 'constant', 'rsqrt' and, before its decay, 'wsd' can be)"
            )
        decay = before - max(1.0, options.decay_fraction * before)
        if options.schedule == "wsd" and newest > decay + 1:
            return (
                f"the decay of optimizer.schedule='wsd' began after step {int(decay) + 1}, and the newest checkpoint is that "
                f"of step {newest}, so the run cannot be extended; train anew in another workdir"
            )
        return None

    def check(self, devices: Devices) -> None:
        """Raises ValueError or TypeError for what training would refuse later; computes nothing.

        The model is traced with a batch of the largest width.
        """
        self.check_devices(devices)
        for rows in (self.train.batch_size, self.eval_batch_size):
            devices.my_rows(rows)
        examples = [self.example_batches(split, self.eval_batch_size)[-1] for split in self.task.splits]
        widest = max(examples, key=lambda batch: batch["inputs"].size)
        with devices.active():
            metric_names_of(self.model, self.task.loss, widest)
        if self.distill is not None:
            narrow = self.example_train_batches()[0]
            check_teacher(self.distill, self.source("teacher"), self.values, self.task, narrow)
            if self.distill.start != "seed":
                self.source("start")

    def source(self, name: Literal["teacher", "start"]) -> Source:
        """Returns the trained model that teaches, or that the student begins with.

        Raises:
          ValueError: there is no such model.
        """
        folder = getattr(self.distill, name)
        if name == "start" and folder == "teacher":
            return self.source("teacher")
        return open_source(f"config.train.distill.{name}", folder, self.config, self.task)

    def teacher(self, devices: Devices) -> Teacher | None:
        """Returns the teacher of a distillation; None without one."""
        if self.distill is None:
            return None
        return Teacher(self.distill, self.source("teacher"), self.task, devices)

    def step_functions(self, devices: Devices) -> StepFunctions:
        """Returns the jitted steps on these devices."""
        self.check_devices(devices)
        return StepFunctions(
            self.model,
            self.optimizer,
            self.task.loss,
            metric_names=self.metric_names,
            devices=devices,
            accumulate=self.train.accumulate,
            frozen=lambda: read_arrays(self.config, devices)[0],
            distill=self.distill,
        )


def _tokens(inputs: np.ndarray) -> int:
    """The length of rows: of ids (b, t), of the ids of pairs (b, 2, t), or of features (b, t, d)."""
    return inputs.shape[-1 if np.issubdtype(inputs.dtype, np.integer) else 1]


def build(config: Mapping[str, Any]) -> Experiment:
    """Returns the experiment that a plain config (see `loading.to_plain`) describes.

    Raises:
      ValueError, TypeError: if a section is invalid; the message names the field.
    """
    train = config_loading.section(config, "train", TrainConfig)
    data = config_loading.section(config, "data", DataConfig)
    optimizer_config = config_loading.section(config, "optimizer", OptimizerConfig)
    task_options = dict(config["task"])
    check_model(config)
    bucketing.check_bucket_bounds(np.ones(1, np.int64), data.bucket_bounds)  # before there are data
    task = make_task(task_options.pop("name"), **task_options)
    check_kind(config, sizes_of(task))
    for name, split in task.splits.items():
        try:
            bucketing.check_bucket_bounds(split.lengths, data.bucket_bounds)
        except ValueError as error:
            raise ValueError(f"split {name!r}: {error}") from None
    distill = train.distill and make_config("config.train.distill", DistillConfig, train.distill)
    values = with_sizes(config, sizes_of(task))
    if distill and distill.hidden:
        values |= {"scan": False}  # the streams after single layers are read
    model = SplitModel(
        lambda rngs: adapted(build_model(values, rngs=rngs), config, rngs=rngs),
        padding=task.padding,
        packed=task.packed,
        unprojected=task.unprojected,
    )
    source = task.splits["train"]
    pipeline.check_widths(source, data.bucket_bounds)
    steps_per_epoch = pipeline.train_batches(source, train.batch_size)
    warmup = optimizer_config.warmup_steps
    if warmup is None:
        warmup = round((optimizer_config.warmup_epochs or 0) * steps_per_epoch)
    optimizer = Optimizer(
        optimizer_config,
        model.parameters,
        warmup_steps=warmup,
        total_steps=train.steps or train.epochs * steps_per_epoch,
    )
    # The widest batch, so that a model that cannot take it says so before anything is computed.
    bounds, longest = bucketing.check_bucket_bounds(source.lengths, data.bucket_bounds), source.lengths.max()
    example = source.gather(np.array([0]), int(bounds[np.searchsorted(bounds, longest)]))
    plan = Experiment(
        config=config,
        train=train,
        data=data,
        mesh=config_loading.section(config, "mesh", MeshConfig),
        task=task,
        model=model,
        optimizer=optimizer,
        steps_per_epoch=steps_per_epoch,
        metric_names=metric_names_of(model, task.loss, example | {"weight": np.ones(1, np.float32)}),
        values=values,
        distill=distill,
    )
    for split in ("train", "validation", "test"):
        if split in task.splits:
            plan.check_split(split)
    return plan


def model_without_data(config: Mapping[str, Any]) -> Any:
    """Returns the model of a plain config, with shapes in place of arrays and unstacked layers.

    Nothing is allocated, and no data are generated or read.

    Raises:
      ValueError: if the config is invalid, or the task knows the sizes of a model only once it has its data.
    """
    name = config["task"].get("name")
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}{suggestion(name, TASKS)}; available: {', '.join(TASKS)}")
    sizes = sizes_without_data(config)
    if not sizes:
        raise ValueError(f"the task {name!r} tells the sizes of a model only once it has its data")
    return abstract_model({**config, "model": config["model"] | {"scan": False}}, sizes)
