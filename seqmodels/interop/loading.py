"""Models from published checkpoints, read a tensor at a time."""

import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers.options import suggestion
from seqmodels.building import build_model
from seqmodels.config import parse
from seqmodels.interop import files
from seqmodels.interop.families import FAMILIES
from seqmodels.interop.family import Family
from seqmodels.interop.options import Options
from seqmodels.interop.tensors import Table, check_tensors, make_table
from seqmodels.language_model import LanguageModel
from seqmodels.names import names_of


def load_pretrained(
    folder: str | os.PathLike, *, dtype: str = "float32", param_dtype: str = "float32"
) -> tuple[LanguageModel, dict[str, Any]]:
    """Returns the model of a checkpoint in the format of transformers, and its config.

    Args:
      folder: folder with config.json, and model.safetensors or shards with model.safetensors.index.json.
      dtype: type of the activations.
      param_dtype: type of the stored matrices; see `StackConfig`.

    Returns:
      The model, whose logits are those of the published one, and the config for `seqmodels.build_model`.

    Raises:
      ImportError: the package safetensors is not installed.
      ValueError: the architecture or an option is not supported, or the files do not fit together; names what is wrong.
    """
    files.library()
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ValueError(
            f"folder={str(folder)!r} is no folder; expected one with config.json and safetensors"
        )
    theirs = files.read_json(folder / files.CONFIG)
    family = family_of(theirs, folder / files.CONFIG)
    config = read_config(family, theirs, of=str(folder / files.CONFIG))
    config |= {"dtype": dtype, "param_dtype": param_dtype}
    stack = parse(config).stack
    check_vocabulary(folder, config["vocab_size"])
    model = shapes_of(config)
    table = make_table(family, stack, model)
    with files.opened_tensors(folder) as tensors:
        _fill(model, config, _Source(folder, tensors, family, table))
    return model, config


def family_of(theirs: dict[str, Any], file: Path) -> Family:
    """Returns the family that a config.json names, or raises ValueError with the nearest one."""
    by_type = {family.model_type: family for family in FAMILIES.values()}
    named = theirs.get("architectures") or []
    for name in named:
        if name in FAMILIES:
            return FAMILIES[name]
    if not named and theirs.get("model_type") in by_type:
        return by_type[theirs["model_type"]]
    name = named[0] if named else theirs.get("model_type")
    raise ValueError(
        f"{file} is of the architecture {name!r}{suggestion(name, FAMILIES if named else by_type)}; "
        f"supported: {', '.join(FAMILIES)}"
    )


def read_config(family: Family, theirs: dict[str, Any], *, of: str) -> dict[str, Any]:
    """Returns our config for the options of a config.json, or raises ValueError for one that is not supported."""
    options = Options(theirs, of=of)
    config = {"kind": "language_model", **family.read(options)}
    options.check_all_read()
    return config


def shapes_of(config: dict[str, Any]) -> LanguageModel:
    """Returns the model of a config with shapes in place of arrays."""
    return nnx.eval_shape(lambda: build_model(config, rngs=nnx.Rngs(0)))


def check_vocabulary(folder: Path, vocab_size: int) -> None:
    """Raises ValueError if a tokenizer.json has ids that the model has no embeddings for."""
    file = folder / files.TOKENIZER
    if not file.exists():
        return
    made = files.read_json(file)
    vocabulary = (made.get("model") or {}).get("vocab") or {}
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
    largest = max([*ids, *(token["id"] for token in made.get("added_tokens") or [])], default=-1)
    if largest >= vocab_size:
        raise ValueError(
            f"{file} has ids up to {largest}, but vocab_size={vocab_size} of config.json; expected ids below it"
        )


class _Source:
    """Arrays for the variables of a model, from the tensors of a checkpoint whose names and shapes it checks first."""

    def __init__(self, folder: Path, tensors: files.Tensors, family: Family, table: Table):
        self._tensors, self._table = tensors, table
        unread = re.compile(family.unread)
        names = {name for name in tensors.names if not unread.search(name)}
        # Some checkpoints are of the model without its head, whose names lack the first part.
        bare = not any(name.startswith(family.base) for name in names)
        self._name = {family.base + name if bare else name: name for name in names}
        if bare:
            self._name |= {name: name for name in names & table.shapes.keys()}
            self._name = {
                name: own
                for name, own in self._name.items()
                if name in table.shapes or own not in table.shapes
            }
        found = {name: tensors.shape(own) for name, own in self._name.items()}
        check_tensors(table.shapes, found, of=str(folder))

    def read(self, name: str) -> np.ndarray | float:
        """Returns the array of a variable, or the number that fills it."""
        if name in self._table.constants:
            return self._table.constants[name]
        pair, place = self._table.pairs[name]
        return pair.load(*(self._tensors.read(self._name[each]) for each in pair.theirs))[place]


def _fill(model: LanguageModel, config: dict[str, Any], source: _Source) -> None:
    """Puts arrays into a model of shapes: parameters from the checkpoint, and all else as it is initialized."""
    parameters, rest = nnx.state(model, nnx.Param), nnx.state(model, nnx.Not(nnx.Param))
    for path, variable in nnx.to_flat_state(parameters):
        names = names_of(path, variable)
        array = np.empty(variable.shape, variable.dtype)
        for number, name in enumerate(names.names):
            array[number if names.stacked else ...] = source.read(name)
        variable.set_value(jnp.asarray(array))
    nnx.update(model, parameters)
    if nnx.to_flat_state(rest):
        made = jax.jit(lambda: nnx.state(build_model(config, rngs=nnx.Rngs(0)), nnx.Not(nnx.Param)))()
        nnx.update(model, made)
