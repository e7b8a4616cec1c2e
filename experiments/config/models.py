"""The model of a config, checked before any data exist."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx

from experiments.tasks import TASKS, make_task
from layers.mixer import Mixer
from layers.registry import make_config
from seqmodels import LanguageModel, LoraConfig, adapt, build_model
from seqmodels.config import KINDS

CLASSIFIERS = ("classifier", "dual_encoder")
REGRESSOR = "regressor"
MASKED = ("masked_language_model", "replaced_token_detector")
SIZES = ("vocab_size", "input_size", "num_classes", "output_size")
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
    name = options.pop("name")
    task = TASKS.get(name)
    if hasattr(task, "sizes"):
        return task.sizes(**options)
    return sizes_of(make_task(name, **options) if getattr(task, "makes_no_data", False) else task)


def with_sizes(config: Mapping[str, Any], sizes: Mapping[str, int]) -> dict[str, Any]:
    """Returns the section `model` with the sizes of the task.

    Raises:
      ValueError: the section sets one of them, or its kind of model has no use for one.
    """
    model, task = config["model"], config["task"].get("name")
    kind = model.get("kind")
    _check_masks(kind, task)
    _check_sources(kind, task)
    if (folder := config.get("train", {}).get("pretrained")) and "vocab_size" in sizes:
        if sizes["vocab_size"] > model["vocab_size"]:
            raise ValueError(
                f"the task {task!r} has {sizes['vocab_size']} tokens, but the checkpoint config.train.pretrained={folder!r} has "
                f"vocab_size={model['vocab_size']}; use its tokenizer, config.task.tokenizer={folder}/tokenizer.json"
            )
        sizes = {name: size for name, size in sizes.items() if name != "vocab_size"}
    if clash := sorted(sizes.keys() & model.keys()):
        raise ValueError(f"config.model sets {', '.join(clash)}, which the task gives; leave it out")
    inputs = {"vocab_size": "tokens", "input_size": "vectors"}
    for other in inputs.keys() & model.keys() if inputs.keys() & sizes.keys() else ():
        (given,) = inputs.keys() & sizes.keys()
        raise ValueError(
            f"config.model sets {other}, but the inputs of the task {task!r} are {inputs[given]}; leave it out"
        )
    wanted = classifier_of(task)
    if kind in KINDS and "num_classes" in sizes and kind != wanted:
        rows = "pair of rows" if wanted == "dual_encoder" else "row"
        raise ValueError(
            f"config.model.kind={kind!r}, but the task {task!r} has one label per {rows}, of {sizes['num_classes']} classes; "
            f"expected kind={wanted!r}"
        )
    _check_regression(config, sizes)
    return model | sizes


def _check_masks(kind: str | None, task: str | None) -> None:
    """Raises ValueError unless the model reads both sides of a token just where tokens are hidden."""
    masks = getattr(TASKS.get(task), "masks", False)
    if kind in MASKED and not masks:
        raise ValueError(
            f"config.model.kind={kind!r}, which reads the tokens that the task {task!r} asks for; expected "
            "another kind, such as 'language_model', or the task 'masked_language'"
        )
    if kind in KINDS and kind not in MASKED and masks:
        raise ValueError(
            f"config.model.kind={kind!r}, but the task {task!r} hides tokens of whole rows; expected {' or '.join(MASKED)}"
        )


def _check_sources(kind: str | None, task: str | None) -> None:
    """Raises ValueError unless the model reads a source just where rows have one, and points where targets name its items."""
    has_source, points = (getattr(TASKS.get(task), name, False) for name in ("has_source", "names_items"))
    wanted = "pointer_network" if points else "encoder_decoder" if has_source else None
    readers = {"encoder_decoder": "copy_source", "pointer_network": "sorting_pointers"}
    if kind not in KINDS or kind == wanted or (wanted is None and kind not in readers):
        return
    rows = "single sequences, not pairs of a source and a target"
    if has_source:
        rows = "pairs of a source and a target" + (" that names its items" if points else "")
    raise ValueError(
        f"config.model.kind={kind!r}, but rows of the task {task!r} are {rows}; expected "
        + (f"kind={wanted!r}" if wanted else f"a task such as {readers[kind]!r}")
    )


def _check_regression(config: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    """Raises ValueError unless the model gives vectors just where the task asks for them, and is causal where it must be."""
    model, task = config["model"], config["task"].get("name")
    kind = model.get("kind")
    if kind in KINDS and (kind == REGRESSOR) != ("output_size" in sizes):
        has = (
            "asks for no vectors of numbers"
            if kind == REGRESSOR
            else "asks for a vector of numbers at tokens"
        )
        expected = "another kind, such as 'language_model'" if kind == REGRESSOR else f"kind={REGRESSOR!r}"
        raise ValueError(f"config.model.kind={kind!r}, but the task {task!r} {has}; expected {expected}")
    if kind == REGRESSOR and getattr(TASKS.get(task), "causal", False) and model.get("causal") is False:
        raise ValueError(
            f"config.model.causal=False, but the inputs of the task {task!r} hold what earlier tokens are asked for; expected True"
        )


def classifier_of(task: str | None) -> str:
    """Returns the kind of model that classifies what a task, by its name, labels: rows or pairs of rows."""
    return "dual_encoder" if getattr(TASKS.get(task), "pairs", False) else "classifier"


def check_kind(config: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    """Raises ValueError if the model classifies rows and the task, all of whose sizes are given, has no label of rows."""
    model, task = config["model"], config["task"].get("name")
    if model.get("kind") in CLASSIFIERS and sizes and not {"num_classes"} & {*sizes, *model}:
        raise ValueError(
            f"config.model.kind={model['kind']!r}, but the labels of the task {task!r} belong to tokens, not to rows; "
            "expected kind='language_model'"
        )


def check_positions(config: Mapping[str, Any], split: str, lengths: np.ndarray) -> None:
    """Raises ValueError if a row of a split, one segment, is longer than the model's table of learned positions."""
    rows, longest = config["model"].get("max_positions"), int(lengths.max(initial=0))
    needed = longest + config["model"].get("first_position", 0)
    if rows is not None and needed > rows:
        raise ValueError(
            f"config.model.max_positions={rows}, but the longest row of the split {split!r} has {longest} tokens; expected "
            f"at least {needed}"
        )


def abstract_model(config: Mapping[str, Any], sizes: Mapping[str, int]) -> Any:
    """Returns the model with shapes in place of arrays; nothing is allocated.

    Raises:
      ValueError, TypeError: the section `model` or `train.lora` is invalid.
    """
    values = with_sizes(config, sizes)

    def make() -> Any:
        rngs = nnx.Rngs(config["seed"])
        return adapted(build_model(values, rngs=rngs), config, rngs=rngs)

    return nnx.eval_shape(make)


def adapted(model: Any, config: Mapping[str, Any], *, rngs: nnx.Rngs) -> Any:
    """Returns the model, with the adapters of `train.lora` if there are any.

    Raises:
      ValueError, TypeError: `train.lora` is invalid.
    """
    if (lora := config.get("train", {}).get("lora")) is not None:
        adapt(model, make_config("train.lora", LoraConfig, lora), rngs=rngs)
    return model


def check_model(config: Mapping[str, Any]) -> None:
    """Raises unless the section `model` is valid; generates and reads no data.

    An unregistered task is left to `make_task`.

    Raises:
      ValueError, TypeError: the section is invalid; the message names the field.
    """
    sizes = sizes_without_data(config)
    if getattr(TASKS.get(config["task"]["name"]), "makes_no_data", False):
        check_kind(config, sizes)
    if not sizes and config["task"]["name"] in TASKS:
        classifies = config["model"].get("kind") in CLASSIFIERS
        sizes = PLACEHOLDERS if classifies else {"vocab_size": PLACEHOLDERS["vocab_size"]}
    if sizes:
        _check_extent(config, abstract_model(config, sizes))


def _check_extent(config: Mapping[str, Any], model: Any) -> None:
    """Raises ValueError if rows have gaps and a layer does not read positions, or their table is shorter than the stretches."""
    if not isinstance(extent := config["task"].get("extent"), int):
        return
    if isinstance(model, LanguageModel):
        mixers = [(path, m) for path, m in nnx.iter_modules(model) if isinstance(m, Mixer)]
        refusing = ["/".join(map(str, path)) for path, mixer in mixers if not mixer.takes_gaps]
        what = f"the mixer {refusing[0]}" if refusing else None
    else:
        what = f"a model of kind={config['model'].get('kind')!r}"
    if what is not None:
        raise ValueError(
            f"task.extent={extent} leaves gaps between the positions of a row, and {what} takes tokens as neighbours; expected a "
            "language_model whose mixers are 'attention', or task.extent=None"
        )
    check_positions(config, "train", np.array([extent]))
