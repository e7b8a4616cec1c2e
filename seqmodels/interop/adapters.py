"""The adapters of a model in the format of peft: adapter_config.json and adapter_model.safetensors, written and read.

Where a tensor of a checkpoint holds several matrices of ours, its adapter has their factors side by side, and where a matrix of
ours holds several tensors, the adapters of these share A:

    [W_1; W_2] + [B_1 0; 0 B_2] [A_1; A_2]        W = [W_1; W_2],  W_k + B_k A
"""

import collections
import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from layers.adapters import LowRank, adapter_of, alpha_of, scale_of
from layers.parameters import Linear
from seqmodels.adapters import has_adapters, linear_maps, without_adapters
from seqmodels.embedding import Embedding
from seqmodels.interop import files
from seqmodels.interop.family import Pair
from seqmodels.interop.hub import folder_of
from seqmodels.interop.loading import family_of
from seqmodels.interop.lora import CONFIG, EMBEDDING_FACTORS, FACTORS, PREFIX, WEIGHTS, Adapter
from seqmodels.interop.saving import express
from seqmodels.interop.tensors import Table
from seqmodels.language_model import LanguageModel

KERNEL, TABLE, WEIGHT = "/kernel", "embedding/table", ".weight"


class Factors(NamedTuple):
    """A (inputs, r), B (r, outputs) and the scale s of s A B."""

    a: np.ndarray
    b: np.ndarray
    scale: float


def save_adapter(
    model: LanguageModel,
    folder: str | os.PathLike,
    *,
    base: str | None = None,
    architecture: str | None = None,
) -> None:
    """Writes the adapters of a model in the format of peft, for the checkpoint that `save_pretrained` would write.

    Args:
      model: a language model that one of the families of `load_pretrained` can express, with adapters (`seqmodels.adapt`).
      folder: a folder, which is made if it does not exist and must not hold an adapter.
      base: folder or name of the checkpoint, which the config names.
      architecture: see `save_pretrained`; that of the checkpoint if its folder is given.

    Raises:
      ImportError: the package safetensors is not installed.
      ValueError: the model has no adapter, no family expresses it, one of its adapters belongs to a tensor that holds more than
        matrices, or the folder holds an adapter.
    """
    package = files.library()
    if not isinstance(model, LanguageModel):
        raise ValueError(f"model is a {type(model).__name__}; expected a language model")
    if not has_adapters(model):
        raise ValueError("the model has no adapters; expected one after seqmodels.adapt")
    folder = files.new_folder(folder, (CONFIG, WEIGHTS))
    if architecture is None and base is not None and (config := Path(base) / files.CONFIG).is_file():
        architecture = family_of(files.read_json(config), config).architecture
    *_, table = express(without_adapters(model), architecture)
    maps = {names: module for names, module in linear_maps(model).items() if module.adapter is not None}
    stabilized, *others = {module.adapter.stabilized for module in maps.values()}
    if others:
        raise ValueError("some adapters of the model are rank-stabilized and some are not; expected one kind")
    rate, *others = sorted({module.adapter.dropout for module in maps.values()})
    if others:
        raise ValueError(f"adapters of the model have dropout of {rate} and {others[0]}; expected one rate")
    own = {
        name: factors for names, module in maps.items() for name, factors in _by_layer(names, module.adapter)
    }
    made, turned = _theirs(own, table)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    tables = {pair.theirs[0].removesuffix(WEIGHT) for pair in _tables(table)}
    for module, (a, b, _) in made.items():
        ends = EMBEDDING_FACTORS if module in tables else FACTORS
        for end, factor in zip(ends, (a, b), strict=True):
            tensors[PREFIX + module + end] = np.ascontiguousarray(factor.T)
    package.numpy.save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    options = {"use_rslora": stabilized, "fan_in_fan_out": turned, "base_model_name_or_path": base}
    options["lora_dropout"] = rate
    files.write_json(folder / CONFIG, _options(made, stabilized) | options)


def load_adapter(
    model: LanguageModel, folder: str | os.PathLike, *, architecture: str | None = None
) -> LanguageModel:
    """Returns the model with an adapter in the format of peft beside its matrices, where `load_pretrained` adds it to them.

    Args:
      model: the model of the checkpoint that the adapter belongs to; its own adapters are replaced.
      folder: folder with adapter_config.json and adapter_model.safetensors.
      architecture: see `save_pretrained`.

    Raises:
      ImportError: the package safetensors is not installed.
      ValueError: there is no such adapter, or it is of another kind or of another checkpoint; names what is wrong.
    """
    files.library()
    place = folder_of(folder, CONFIG)
    model = without_adapters(model)
    *_, table = express(model, architecture)
    with contextlib.ExitStack() as stack:
        adapter = Adapter(place, stack.enter_context(files.opened_tensors(place, WEIGHTS)))
        adapter.check(table.shapes)
        for whole in adapter.experts:
            raise ValueError(
                f"{place} adapts {whole}, whose experts take no adapter beside them; expected seqmodels.load_pretrained(adapter=...), "
                "which adds it to their matrices"
            )
        for module in adapter.embeddings:
            adapter.check_base(module, np.asarray(model.embedding.table[...]))
        found = _ours(adapter, table)
    for names, module in linear_maps(model).items():
        if any(given := [found.get(name) for name in names]):
            a, b, scale = _stacked(given, module)
            alpha = alpha_of(scale, b.shape[-2], adapter.stabilized)
            options = dict(alpha=alpha, stabilized=adapter.stabilized, dropout=adapter.dropout)
            module.adapter = adapter_of(module, jnp.asarray(a), jnp.asarray(b), **options)
    return model


def _by_layer(names: tuple[str, ...], adapter: LowRank) -> Iterator[tuple[str, Factors]]:
    """Yields the factors of a linear map, or of those stacked in it, by name."""
    a, b = (np.asarray(factor[...]) for factor in (adapter.a, adapter.b))
    for number, name in enumerate(names):
        yield name, Factors(*((a[number], b[number]) if a.ndim == 3 else (a, b)), adapter.scale)


def _theirs(own: Mapping[str, Factors], table: Table) -> tuple[dict[str, Factors], bool]:
    """Returns factors by modules of the checkpoint, and whether its matrices are (inputs, outputs), as ours."""
    made: dict[str, Factors] = {}
    turned = set()
    for pair in _tables(table):
        if (given := own.get(_name(TABLE))) is not None:
            made[pair.theirs[0].removesuffix(WEIGHT)] = given
    for pair, sizes, is_turned in _matrices(table):
        given = [own.get(name.removesuffix(KERNEL)) for name in pair.ours]
        if not any(given):
            continue
        a, blocks, scale = _side_by_side(given, sizes)
        for name, b in zip(pair.theirs, pair.save(*blocks), strict=True):
            made[name.removesuffix(WEIGHT)] = Factors(a, b if is_turned else b.T, scale)
        turned.add(is_turned)
    if len(turned) > 1:
        raise ValueError(
            "adapters of peft are of matrices (outputs, inputs) or of those (inputs, outputs); the model's are of both kinds"
        )
    return made, turned == {True}


def _ours(adapter: Adapter, table: Table) -> dict[str, Factors]:
    """Returns factors by our linear maps."""
    found: dict[str, Factors] = {}
    for pair in _tables(table):
        if (module := pair.theirs[0].removesuffix(WEIGHT)) in adapter.embeddings:
            found[_name(TABLE)] = _read(adapter, module)
    for pair, _, is_turned in _matrices(table):
        given = []
        for name in pair.theirs:
            module = name.removesuffix(WEIGHT)
            given.append(None if module not in adapter.modules else _read(adapter, module))
        if not any(given):
            continue
        shapes = [table.shapes[name] for name in pair.theirs]
        a, blocks, scale = _side_by_side(given, [shape[1 if is_turned else 0] for shape in shapes])
        parts = pair.load(*(block if is_turned else block.T for block in blocks))
        found |= {
            name.removesuffix(KERNEL): Factors(a, b, scale) for name, b in zip(pair.ours, parts, strict=True)
        }
    return found


def _read(adapter: Adapter, module: str) -> Factors:
    a, b, alpha = adapter.factors(module)
    return Factors(a.T, b.T, scale_of(alpha, len(a), adapter.stabilized))


def _name(variable: str) -> str:
    """Returns the name of the map whose matrix a variable is."""
    return variable.rpartition("/")[0]


def _tables(table: Table) -> list[Pair]:
    """Returns the pair of the embeddings, if it holds a matrix of theirs as it is."""
    pair, _ = table.pairs.get(TABLE, (None, 0))
    return [pair] if pair is not None and len(pair.theirs) == len(pair.ours) == 1 else []


def _matrices(table: Table) -> Iterator[tuple[Pair, list[int], bool]]:
    """Yields pairs of matrices, the numbers of outputs of ours, and whether theirs are (inputs, outputs)."""
    for pair in {pair.ours: pair for pair, _ in table.pairs.values()}.values():
        shapes = [table.shapes[name] for name in pair.theirs]
        if not all(name.endswith(KERNEL) for name in pair.ours) or any(len(shape) != 2 for shape in shapes):
            continue
        sizes = [
            part.shape[-1] for part in pair.load(*(np.broadcast_to(np.float32(0), shape) for shape in shapes))
        ]
        # Rows of a number that is none of outputs show where they go.
        rows = 1 + sum(sizes)
        first, *_ = pair.save(*(np.broadcast_to(np.float32(0), (rows, size)) for size in sizes))
        yield pair, sizes, first.shape[0] == rows


def _side_by_side(
    given: Sequence[Factors | None], sizes: Sequence[int]
) -> tuple[np.ndarray, list[np.ndarray], float]:
    """Returns A of all, B of each with zeros for the ranks of the others, and their scale.

    Args:
      sizes: numbers of outputs, also of those that have no factors.
    """
    present = [factors for factors in given if factors is not None]
    scale = present[0].scale
    shared = len(present) == len(given) and all(np.array_equal(each.a, present[0].a) for each in present)
    a = present[0].a if shared else np.concatenate([each.a for each in present], axis=-1)
    blocks, start = [], 0
    for factors, size in zip(given, sizes, strict=True):
        block = np.zeros((a.shape[-1], size), np.float32)
        if factors is not None:
            rank = len(factors.b)
            block[start : start + rank] = _rescaled(factors, scale)
            start += 0 if shared else rank
        blocks.append(block)
    return a, blocks, scale


def _rescaled(factors: Factors, scale: float) -> np.ndarray:
    """Returns B of factors that have another scale."""
    return factors.b if factors.scale == scale else np.float32(factors.scale / scale) * factors.b


def _stacked(given: Sequence[Factors | None], module: Linear | Embedding) -> Factors:
    """Returns the factors of a linear map, or of stacked ones, whose ranks are filled with zeros."""
    *layers, inputs, outputs = module.kernel.shape
    rank = max(len(factors.b) for factors in given if factors is not None)
    scale = next(factors.scale for factors in given if factors is not None)
    a, b = np.zeros((len(given), inputs, rank), np.float32), np.zeros((len(given), rank, outputs), np.float32)
    for number, factors in enumerate(given):
        if factors is not None:
            a[number, :, : len(factors.b)] = factors.a
            b[number, : len(factors.b)] = _rescaled(factors, scale)
    return Factors(a, b, scale) if layers else Factors(a[0], b[0], scale)


def _options(made: Mapping[str, Factors], stabilized: bool) -> dict[str, Any]:
    """Returns the options of adapter_config.json that follow from the factors."""
    ranks = {module: len(factors.b) for module, factors in made.items()}
    alphas = {module: alpha_of(factors.scale, ranks[module], stabilized) for module, factors in made.items()}
    (rank, _), (alpha, _) = (collections.Counter(each.values()).most_common(1)[0] for each in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "bias": "none",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(made),
        "rank_pattern": {module: size for module, size in ranks.items() if size != rank},
        "alpha_pattern": {module: value for module, value in alphas.items() if value != alpha},
    }
