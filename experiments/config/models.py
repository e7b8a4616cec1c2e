"""The model of a config, checked before there are data."""

from collections.abc import Mapping
from typing import Any

from flax import nnx

from experiments.tasks import TASKS, make_task
from seqmodels import build_model

SIZES = ("vocab_size", "input_size", "num_classes")
# Stand in for the sizes of a task that knows them only once it has its data.
PLACEHOLDERS = {"vocab_size": 2, "num_classes": 2}


def sizes_of(task: Any) -> dict[str, int]:
    """The sizes of a model that a task, or its class, gives."""
    sizes = {name: getattr(task, name, None) for name in SIZES}
    return {name: size for name, size in sizes.items() if isinstance(size, int)}


def sizes_without_data(config: Mapping[str, Any]) -> dict[str, int]:
    """The sizes of the model that are known before there are data; none if there is no such task.

    Raises:
      ValueError: config.task has no name, or the task refuses an option.
    """
    options = dict(config["task"])
    if "name" not in options:
        raise ValueError("config.task has no 'name'")
    task = TASKS.get(options["name"])
    return sizes_of(make_task(**options) if getattr(task, "makes_no_data", False) else task)


def with_sizes(config: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    """The section `model` with the sizes that the task gives.

    Raises:
      ValueError: the section sets one of them.
    """
    if clash := sorted(sizes.keys() & config["model"].keys()):
        raise ValueError(f"config.model sets {', '.join(clash)}, which the task gives; leave it out")
    return config["model"] | sizes


def abstract_model(config: Mapping[str, Any], sizes: Mapping[str, int]) -> Any:
    """The model with shapes in place of arrays: nothing is allocated.

    Raises:
      ValueError, TypeError: the section `model` does not make sense.
    """
    values = with_sizes(config, sizes)
    return nnx.eval_shape(lambda: build_model(values, rngs=nnx.Rngs(config["seed"])))


def check_model(config: Mapping[str, Any]) -> None:
    """Raises unless the section `model` makes sense; makes and reads no data.

    A task that is not registered is left to `make_task`.

    Raises:
      ValueError, TypeError: the section does not make sense; the message names the field.
    """
    sizes = sizes_without_data(config)
    if not sizes and config["task"]["name"] in TASKS:
        classifies = config["model"].get("kind") == "classifier"
        sizes = PLACEHOLDERS if classifies else {"vocab_size": PLACEHOLDERS["vocab_size"]}
    if sizes:
        abstract_model(config, sizes)
