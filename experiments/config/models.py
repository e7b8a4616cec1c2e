"""The model of a config, checked before any data exist."""

from collections.abc import Mapping
from typing import Any

from flax import nnx

from experiments.tasks import TASKS, make_task
from seqmodels import build_model

SIZES = ("vocab_size", "input_size", "num_classes")
# Placeholders for the sizes of a task that knows them only once it has its data.
PLACEHOLDERS = {"vocab_size": 2, "num_classes": 2}


def sizes_of(task: Any) -> dict[str, int]:
    """Returns the model sizes that a task, or its class, defines."""
    sizes = {name: getattr(task, name, None) for name in SIZES}
    return {name: size for name, size in sizes.items() if isinstance(size, int)}


def sizes_without_data(config: Mapping[str, Any]) -> dict[str, int]:
    """Returns the model sizes that are known without data; empty if there is no such task.

    Raises:
      ValueError: config.task has no name, or the task refuses an option.
    """
    options = dict(config["task"])
    if "name" not in options:
        raise ValueError("config.task has no 'name'")
    task = TASKS.get(options["name"])
    return sizes_of(make_task(**options) if getattr(task, "makes_no_data", False) else task)


def with_sizes(config: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    """Returns the section `model` with the sizes of the task.

    Raises:
      ValueError: the section sets one of them.
    """
    if clash := sorted(sizes.keys() & config["model"].keys()):
        raise ValueError(f"config.model sets {', '.join(clash)}, which the task gives; leave it out")
    return config["model"] | sizes


def abstract_model(config: Mapping[str, Any], sizes: Mapping[str, int]) -> Any:
    """Returns the model with shapes in place of arrays; nothing is allocated.

    Raises:
      ValueError, TypeError: the section `model` is invalid.
    """
    values = with_sizes(config, sizes)
    return nnx.eval_shape(lambda: build_model(values, rngs=nnx.Rngs(config["seed"])))


def check_model(config: Mapping[str, Any]) -> None:
    """Raises unless the section `model` is valid; generates and reads no data.

    An unregistered task is left to `make_task`.

    Raises:
      ValueError, TypeError: the section is invalid; the message names the field.
    """
    sizes = sizes_without_data(config)
    if not sizes and config["task"]["name"] in TASKS:
        classifies = config["model"].get("kind") == "classifier"
        sizes = PLACEHOLDERS if classifies else {"vocab_size": PLACEHOLDERS["vocab_size"]}
    if sizes:
        abstract_model(config, sizes)
