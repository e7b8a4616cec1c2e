"""Models from published checkpoints, read a tensor at a time."""

import concurrent.futures
import contextlib
import os
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, Sharding

from layers.options import suggestion
from layers.sharding_rules import ShardingRules
from seqmodels.building import build_model
from seqmodels.config import StackConfig, parse
from seqmodels.encoder_decoder import EncoderDecoder
from seqmodels.interop import files
from seqmodels.interop.families import FAMILIES
from seqmodels.interop.family import Family
from seqmodels.interop.hub import folder_of
from seqmodels.interop.lora import CONFIG, EXPERTS, WEIGHTS, Adapter
from seqmodels.interop.options import Options
from seqmodels.interop.placing import Parts, default_sharding, sharding_of
from seqmodels.interop.tensors import STORED, Table, check_tensors, make_table
from seqmodels.language_model import LanguageModel
from seqmodels.masked_language_model import MaskedLanguageModel
from seqmodels.names import Names, names_of

Model = LanguageModel | MaskedLanguageModel | EncoderDecoder
OTHERS = nnx.Not(nnx.Any(*STORED))
# Tensors that are read at once.
READERS = 8


def load_pretrained(
    folder: str | os.PathLike,
    *,
    dtype: str = "float32",
    param_dtype: str = "float32",
    max_length: int | None = None,
    adapter: str | os.PathLike | None = None,
    scan: bool = True,
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
) -> tuple[Model, dict[str, Any]]:
    """Returns the model of a checkpoint in the format of transformers, and its config.

    Beside the model, memory holds a few tensors at a time, and the largest variables are read first.

    Args:
      folder: folder with config.json, and model.safetensors or shards with model.safetensors.index.json; or an identifier
        of the Hugging Face hub, such as "Qwen/Qwen3-0.6B", which the package huggingface_hub fetches or finds in its cache.
      dtype: type of the activations.
      param_dtype: type of the stored matrices; see `StackConfig`.
      max_length: number of tokens that rows will have, for positions that depend on it ("dynamic", "longrope"): those beyond
        the length of training change the angles of all. By default rows are within the length of training.
      adapter: folder of a low-rank adapter in the format of peft, which is merged into the matrices.
      scan: whether equal layers are stacked, which whole passes compile once; generation runs layers one by one, and copies
        stacked ones.
      mesh: devices that the parameters are divided over, part by part as they are read; the default device if None.
      rules: which axis of the mesh divides which axis of parameters; `ShardingRules()` if None.

    Returns:
      The model, masked or not or an encoder-decoder, whose logits are those of the published one, and the config for `seqmodels.build_model`.

    Raises:
      ImportError: the package safetensors is not installed.
      ValueError: the architecture or an option is not supported, or the files do not fit together; names what is wrong.
    """
    config = load_config(folder, max_length=max_length) | {"dtype": dtype, "param_dtype": param_dtype}
    config |= {} if scan else {"scan": False}
    return load_weights(folder, config, adapter=adapter, mesh=mesh, rules=rules), config


def load_weights(
    folder: str | os.PathLike,
    config: dict[str, Any],
    *,
    adapter: str | os.PathLike | None = None,
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
) -> Model:
    """Returns the model of a config with the weights of a checkpoint.

    Args:
      config: what `load_config` returns, or one with other options of training, such as `dropout`, `remat` and `scan`.
      folder, adapter, mesh, rules: see `load_pretrained`.
    """
    files.library()
    folder = folder_of(folder)
    check_vocabulary(folder, config["vocab_size"])
    model = shapes_of(config)
    family = family_of(files.read_json(folder / files.CONFIG), folder / files.CONFIG)
    table = make_table(family, parse(config), model)
    with contextlib.ExitStack() as stack:
        opened, joined = stack.enter_context(files.opened_tensors(folder)), family.joined(parse(config).stack)
        tensors = files.parted(opened, joined, of=str(folder))
        source = _Source(folder, tensors, family, table)
        if adapter is not None:
            place = folder_of(adapter, CONFIG)
            added = Adapter(place, stack.enter_context(files.opened_tensors(place, WEIGHTS)))
            if added.embeddings and config.get("tie_embeddings"):
                raise ValueError(
                    f"{place} adapts {added.embeddings[0]}, whose matrix is the head's too (tie_word_embeddings=True), so that a sum "
                    "would change both; expected seqmodels.load_adapter, which keeps it beside"
                )
            source.adapt(added, parse(config).stack)
        _fill(model, config, source, mesh, rules or ShardingRules())
    return model


def load_config(folder: str | os.PathLike, *, max_length: int | None = None) -> dict[str, Any]:
    """Returns the config of the model of a checkpoint, without its weights; see `load_pretrained`."""
    file = folder_of(folder) / files.CONFIG
    theirs = files.read_json(file)
    return read_config(family_of(theirs, file), theirs, of=str(file), length=max_length)


def family_of(theirs: dict[str, Any], file: Path) -> Family:
    """Returns the family that a config.json names, or raises ValueError with the nearest one."""
    by_type = {family.model_type: family for family in FAMILIES.values()}
    named = theirs.get("architectures") or []
    if not isinstance(named, list):
        raise ValueError(f"{file} has architectures={named!r}; expected a list of names")
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


def read_config(
    family: Family, theirs: dict[str, Any], *, of: str, length: int | None = None
) -> dict[str, Any]:
    """Returns our config for the options of a config.json, or raises ValueError for one that is not supported."""
    options = Options(theirs, of=of, length=length)
    config = {"kind": "language_model", **family.read(options)}
    options.check_all_read()
    return config


def shapes_of(config: dict[str, Any]) -> Model:
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

    def __init__(self, folder: Path, tensors: files.Tensors | files.Parted, family: Family, table: Table):
        self._tensors, self._table, self._family = tensors, table, family
        unread = re.compile(family.unread)
        named = {family.known_as(name): name for name in tensors.names if not unread.search(name)}
        names = named.keys()
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
        self._name = {name: named[own] for name, own in self._name.items()}
        found = {name: tensors.shape(own) for name, own in self._name.items()}
        check_tensors(table.shapes, found, of=str(folder))
        self._adapter: Adapter | None = None
        self._experts: dict[str, tuple[str, str, int]] = {}

    def adapt(self, adapter: Adapter, stack: StackConfig) -> None:
        """Adds what an adapter adds to what is read from here on."""
        adapter.check(self._table.shapes)
        for whole in adapter.experts:
            where = self._family.experts(whole, stack)
            held = {
                f"{where}/{name}": (whole, parameter, part)
                for parameter, names in EXPERTS.items()
                for part, name in enumerate(names)
            }
            if held.keys() - self._table.pairs.keys():
                raise ValueError(f"{adapter.folder} adapts {whole}, and the model has no experts there")
            self._experts |= held
        self._adapter = adapter

    def read(self, name: str) -> np.ndarray | float:
        """Returns the array of a variable, or the number that fills it."""
        if name in self._table.constants:
            return self._table.constants[name]
        pair, place = self._table.pairs[name]
        array = pair.load(*map(self._tensor, pair.theirs))[place]
        if (at := self._experts.get(name)) is None:
            return array
        return self._adapter.add_experts(*at, array, self._family.alternating)

    def _tensor(self, name: str) -> np.ndarray:
        tensor = self._tensors.read(self._name[name])
        return tensor if self._adapter is None else self._adapter.add(name, tensor)


def _fill(
    model: Model,
    config: dict[str, Any],
    source: _Source,
    mesh: Mesh | None,
    rules: ShardingRules,
) -> None:
    """Puts arrays into a model of shapes: parameters from the checkpoint, and all else as it is initialized."""
    stored, rest = nnx.state(model, STORED), nnx.state(model, OTHERS)
    placed = [
        (names_of(path, variable), variable, sharding_of(variable, mesh, rules))
        for path, variable in nnx.to_flat_state(stored)
    ]
    # What is read at once stands in memory twice: the largest come first, beside little else.
    placed.sort(key=lambda each: -each[1].size / len(each[0].names))

    def made(each: tuple[Names, nnx.Variable, Sharding]) -> jax.Array:
        names, variable, sharding = each
        parts = Parts(variable.shape, variable.dtype, sharding)
        for number, name in enumerate(names.names):
            parts.write(source.read(name), number if names.stacked else None)
        return parts.array()

    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        for (_, variable, _), array in zip(placed, pool.map(made, placed), strict=True):
            variable.set_value(array)
    nnx.update(model, stored)
    if nnx.to_flat_state(rest):
        where: Sharding = default_sharding(mesh)
        build = jax.jit(lambda: nnx.state(build_model(config, rngs=nnx.Rngs(0)), OTHERS), out_shardings=where)
        nnx.update(model, build())
