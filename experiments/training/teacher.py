"""The teacher of a distillation, and the parameters that a student begins with."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.config.loading import to_plain
from experiments.config.models import sizes_of, with_sizes
from experiments.parallel.mesh import Devices
from experiments.runs.checkpoints import Checkpoints, choose_step
from experiments.runs.directory import RunDirectory
from experiments.tasks.task import Task
from experiments.training.distillation import HIDDEN, KINDS, LOGITS, DistillConfig
from experiments.training.model import Arrays, Declaration, SplitModel
from experiments.training.step import Batch, OnMesh
from layers.cross_entropy import Unprojected
from layers.mixers.attention.attention import Attention
from layers.mixers.state_space.mamba2 import Mamba2, Mamba2Config
from layers.parts.attention_config import AttentionConfig
from layers.typing import Array
from seqmodels import build_model
from seqmodels.config import parse
from seqmodels.from_attention import fits, mamba2_from_attention
from seqmodels.interop.loading import load_config, load_pretrained
from seqmodels.names import by_layer
from seqmodels.recording import recording


class Source(NamedTuple):
    """A trained model.

    Attributes:
      values: what `seqmodels.build_model` takes, with layers apart.
      read: reads its parameters and statistics, by the names of their layers.
    """

    values: dict[str, Any]
    read: Callable[[], dict[str, Array]]


def open_source(name: str, folder: str | os.PathLike, config: Mapping[str, Any], task: Task) -> Source:
    """Returns the best model of a run, or a published one, on the task of another run.

    Args:
      name: what names the folder, for messages.
      folder: work directory of the run, or folder or identifier of the published checkpoint.
      config, task: plain config of the other run, and its task.

    Raises:
      ValueError: the folder has no such model, or it does not fit the task.
    """
    try:
        if not (Path(folder) / "checkpoints").is_dir():
            values = to_plain({**config, "model": load_config(folder)})["model"]
            return Source(values | {"scan": False}, lambda: by_layer(load_pretrained(folder)[0]))
        run = RunDirectory(folder)
        theirs = run.config()
        if theirs["train"].get("lora") is not None:
            raise ValueError(
                "the run has trained adapters alone; expected the folder into which experiments.convert merges them"
            )
        with Checkpoints(run.checkpoints) as checkpoints:
            step = choose_step(checkpoints, "best")
        values = with_sizes({**theirs, "task": config["task"]}, sizes_of(task))
    except (ValueError, ImportError) as error:
        raise ValueError(f"{name}={str(folder)!r}: {error}") from None

    def read() -> dict[str, Array]:
        with Checkpoints(run.checkpoints) as checkpoints:
            arrays, _ = checkpoints.load(step)
        averaged = any(key.startswith("average/") for key in arrays)
        sections = "average/" if averaged else "parameters/", "statistics/"
        return {
            key.removeprefix(section): array
            for section in sections
            for key, array in arrays.items()
            if key.startswith(section)
        }

    return Source(values | {"scan": False}, read)


class Teacher:
    """A model that reads batches before the student, and adds to them what it makes of them."""

    def __init__(self, config: DistillConfig, source: Source, task: Task, devices: Devices):
        """Reads the parameters."""
        self._config, self._devices = config, devices
        self._model = split(source.values, task)
        declared = self._model.parameters, self._model.statistics
        with devices.active():
            arrays = arrays_for(self._model, source.read())
            self._arrays = jax.device_put(arrays, tuple(map(devices.shardings, declared)))
        self._run = OnMesh(jax.jit(self._read), devices)

    def __call__(self, batch: Batch) -> dict[str, Array]:
        """Returns the batch with the outputs of the teacher."""
        return {**batch, **self._run(self._arrays, dict(batch))}

    def abstract(self, batch: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of what a call gives for a batch of such shapes."""
        with self._devices.active():
            added = jax.eval_shape(self._read, self._arrays, dict(batch))
        return {**batch, **self._devices.abstract_batch(added)}

    def _read(self, arrays: tuple[Arrays, Arrays], batch: Batch) -> dict[str, Array]:
        read = taught(self._config, self._model, arrays, batch)
        return {
            name: jax.lax.with_sharding_constraint(array, self._devices.of_batch(array.shape))
            for name, array in read.items()
        }


def taught(
    config: DistillConfig, model: SplitModel, arrays: tuple[Arrays, Arrays], batch: Batch
) -> dict[str, Array]:
    """Returns what a teacher adds to a batch: float32 logits, and the streams after each layer (b, t, l, d). A pure function."""
    if config.hidden:
        with recording() as hidden:
            outputs, _ = model(*arrays, batch, key=None)
    else:
        outputs, _ = model(*arrays, batch, key=None)
    logits = outputs.logits if isinstance(outputs, Unprojected) else outputs
    added = {LOGITS: logits.astype(jnp.float32)} if config.logits else {}
    return added | ({HIDDEN: jnp.stack(hidden, axis=2)} if config.hidden else {})


def check_teacher(
    config: DistillConfig, source: Source, student: Mapping[str, Any], task: Task, batch: Batch
) -> None:
    """Raises ValueError unless a teacher gives what the student of these values can learn from; computes nothing.

    Args:
      batch: a batch of the task.
    """
    for who, values in (
        ("config.model", student),
        ("the model of config.train.distill.teacher", source.values),
    ):
        if values["kind"] not in KINDS:
            raise ValueError(f"{who} has kind={values['kind']!r}; distillation is for {' and '.join(KINDS)}")
    if config.hidden:
        ours, theirs = (parse(values).stack for values in (student, source.values))
        if any(stack.route is not None or stack.residual == "reversible" for stack in (ours, theirs)):
            raise ValueError(
                "train.distill.hidden reads all tokens of one stream after each layer; expected model.route=None and another "
                "model.residual than 'reversible'"
            )
        if (sizes := (ours.depth, ours.width)) != (others := (theirs.depth, theirs.width)):
            raise ValueError(
                f"train.distill.hidden={config.hidden} compares streams, but the student has depth and width {sizes} and the "
                f"teacher {others}; expected the same, or train.distill.hidden=0"
            )
    shapes = [_outputs(split(values, task), batch) for values in (student, source.values)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"the student gives outputs of shape {shapes[0]} and train.distill.teacher={config.teacher!r} of {shapes[1]} for one "
            "batch; expected a teacher of the same vocabulary or classes"
        )


def _outputs(model: SplitModel, batch: Batch) -> tuple[int, ...]:
    def run(parameters: Arrays, statistics: Arrays, batch: Batch) -> Array:
        outputs, _ = model(parameters, statistics, batch, key=None)
        return outputs.logits if isinstance(outputs, Unprojected) else outputs

    return jax.eval_shape(run, _shapes(model.parameters), _shapes(model.statistics), dict(batch)).shape


def begun(
    model: SplitModel, values: Mapping[str, Any], source: Source, task: Task, seed: int
) -> tuple[Arrays, Arrays]:
    """Returns the parameters and statistics of a student that begins with those of a trained model; see `DistillConfig.start`.

    Args:
      model, values: the student, and what `seqmodels.build_model` makes it of.
    """
    apart = split({**values, "scan": False}, task)
    mixers, theirs = apart.mixers, split(source.values, task).mixers
    pairs: dict[str, tuple[AttentionConfig, Mamba2Config]] = {}
    for path, (kind, config) in mixers.items():
        before, attention = theirs.get(path, (None, None))
        if kind is Mamba2 and before is Attention and fits(attention, config):
            pairs[path] = attention, config

    def make(key: jax.Array, given: Arrays) -> tuple[Arrays, Arrays]:
        drawn = model.initialise(key)
        declared = model.parameters, model.statistics
        named: Arrays = {}
        for arrays, declarations in zip(drawn, declared, strict=True):
            for path, array in arrays.items():
                named |= declarations[path].split(array)
        named |= {
            name: given[name].astype(array.dtype)
            for name, array in named.items()
            if name in given and given[name].shape == array.shape
        }
        for path, (attention, config) in pairs.items():
            before, ours = _under(path, given), _under(path, named)
            named |= {
                f"{path}/{name}": array
                for name, array in mamba2_from_attention(attention, before, config, ours).items()
            }
        return tuple(
            {path: declaration.join(named) for path, declaration in each.items()} for each in declared
        )

    return jax.jit(make)(jax.random.key(seed), source.read())


def split(values: Mapping[str, Any], task: Task) -> SplitModel:
    """Returns the model of these values on a task."""
    return SplitModel(
        lambda rngs: build_model(values, rngs=rngs),
        padding=task.padding,
        packed=task.packed,
        unprojected=task.unprojected,
    )


def _under(path: str, arrays: Mapping[str, Array]) -> dict[str, Array]:
    prefix = f"{path}/"
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def arrays_for(model: SplitModel, found: Mapping[str, Array]) -> tuple[Arrays, Arrays]:
    """Returns the parameters and statistics of a model, from arrays by the names of their layers."""
    return tuple(
        {path: jnp.asarray(d.join(found), d.dtype) for path, d in declared.items()}
        for declared in (model.parameters, model.statistics)
    )


def _shapes(declared: Mapping[str, Declaration]) -> dict[str, jax.ShapeDtypeStruct]:
    return {path: jax.ShapeDtypeStruct(d.shape, d.dtype) for path, d in declared.items()}
