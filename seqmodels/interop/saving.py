"""Models written in the format of transformers, where it has an architecture that computes the same."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers.mixers.parallel import Parallel
from layers.registry import choose
from seqmodels.adapters import has_adapters
from seqmodels.block import Block
from seqmodels.config import parse
from seqmodels.encoder_decoder import EncoderDecoder
from seqmodels.interop import files
from seqmodels.interop.families import FAMILIES
from seqmodels.interop.family import Family
from seqmodels.interop.loading import Model, read_config, shapes_of
from seqmodels.interop.tensors import STORED, Table, make_table
from seqmodels.names import names_of
from seqmodels.stack import Stack

SHARD = 5_000_000_000
# Parts of the block of a layer.
_PARTS = (
    "mixer",
    "cross",
    "channel",
    "mixer_norm",
    "cross_norm",
    "mixer_output_norm",
    "cross_output_norm",
    "channel_norm",
    "channel_output_norm",
)
_OF_STACKS = ("width", "depth", "residual", "shared_norm", "norm_position", "residual_scale", "branch_scale")
# Options of training and initial values, which a published config does not have.
_OF_TRAINING = {
    "dtype",
    "depth",
    "layer",
    "dropout",
    "dt_min",
    "dt_max",
    "dt_floor",
    "a_min",
    "a_max",
    "r_min",
    "r_max",
}
_OF_TRAINING |= {"zero_init", "balance", "z_loss", "compute", "embedding_stddev"}
# Sizes that shapes of parameters tell, whose defaults depend on others.
_OF_SHAPES = {
    "hidden",
    "inner",
    "expand",
    "head_dim",
    "kv_heads",
    "dt_rank",
    "state_size",
    "value_heads",
    "key_dim",
    "value_dim",
    "multiple_of",
}


def save_pretrained(
    model: Model,
    folder: str | os.PathLike,
    *,
    architecture: str | None = None,
    shard_size: int = SHARD,
) -> None:
    """Writes a model in the format of transformers: config.json, and model.safetensors or shards with an index.

    Args:
      model: a language model, masked or not, or an encoder-decoder that one of the families of `load_pretrained` can express.
      architecture: name of the family, such as "MistralForCausalLM"; by default the first that expresses the model.
      folder: a folder, which is made if it does not exist and must not hold a checkpoint.
      shard_size: about the most bytes per file.

    Raises:
      ImportError: the package safetensors is not installed.
      ValueError: no family expresses the model (says why the nearest does not), or the folder holds a checkpoint.
    """
    files.library()
    if not isinstance(model, Model):
        raise ValueError(
            f"model is a {type(model).__name__}; only language models have a format of transformers"
        )
    if has_adapters(model):
        raise ValueError(
            "the model has adapters; expected one after seqmodels.merge_adapters, or seqmodels.save_adapter for them alone"
        )
    folder = files.new_folder(folder, (files.CONFIG, files.WHOLE, files.INDEX))
    family, theirs, table = express(model, architecture)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_tensors(folder, _tensors(model, table), shard_size=shard_size)
    # Last, so that a folder with a config is complete.
    dtype = jnp.dtype(model.config.stack.param_dtype).name
    named = {"architectures": [family.architecture], "model_type": family.model_type, "torch_dtype": dtype}
    files.write_json(folder / files.CONFIG, theirs | named)


def express(model: Model, architecture: str | None = None) -> tuple[Family, dict[str, Any], Table]:
    """Returns the family that expresses a model, its options, and the table of tensors, or raises ValueError."""
    candidates = FAMILIES
    if architecture is not None:
        candidates = {architecture: choose("architecture", FAMILIES, architecture)}
    reasons: dict[str, list[str]] = {}
    for name, family in candidates.items():
        try:
            theirs = family.write(model)
            config = read_config(family, theirs, of=name)
            twin = shapes_of(config)
        except (KeyError, AttributeError, ValueError, TypeError) as error:
            if architecture is not None:
                why = f" ({error})" if isinstance(error, ValueError) else ""
                raise ValueError(
                    f"{name} cannot express the model, whose layers are {', '.join(model.config.stack.pattern)}{why}; expected an "
                    "architecture with such layers, or architecture=None for the first that expresses it"
                ) from error
            continue  # a mixer or channel mixer of another kind
        reasons[name] = differences(model, twin)
        if not reasons[name]:
            return family, theirs, make_table(family, parse(config), twin)
    if not reasons:
        pattern = ", ".join(model.config.stack.pattern)
        raise ValueError(
            f"no supported architecture of transformers has layers of {pattern}; supported: {', '.join(FAMILIES)}"
        )
    # The structure is compared first: where options of layers differ, it is the same.
    name = min(reasons, key=lambda each: (":" not in reasons[each][0], len(reasons[each])))
    raise ValueError(
        f"no supported architecture of transformers expresses the model; the nearest, {name}, has {'; '.join(reasons[name][:3])}"
    )


def differences(model: Model, twin: Model) -> list[str]:
    """Returns one line for each option by which the outputs of a model of equal parameters differ from its twin's."""
    if found := _compare("kind", type(model).__name__, type(twin).__name__):
        return found
    for field in dataclasses.fields(model.config):
        # Those of stacks are compared layer by layer.
        if field.name not in ("input", "stack", "encoder", "cross"):
            found += _compare(field.name, *(getattr(each.config, field.name) for each in (model, twin)))
    found += _options("", model.config.input, twin.config.input)
    sides = list(zip(_sides(model), _sides(twin), strict=True))
    for where, stacks in ((own.where, (own.stack.config, other.stack.config)) for own, other in sides):
        for name in _OF_STACKS:
            found += _compare(where + name, *(getattr(stack, name) for stack in stacks))
    if found:
        return found
    for own, other in sides:
        where, stack = own.where, own.stack
        if own.norm is not None:
            found += _options(f"{where}norm.", own.norm.config, other.norm.config)
        for layer, (ours, theirs) in enumerate(zip(_blocks(stack), _blocks(other.stack), strict=True)):
            found += _block(f"{where}layer {layer}: ", ours, theirs)
        for number, pair in enumerate(zip(stack.shared, other.stack.shared, strict=False)):
            parts = ("mixer", "channel", "mixer_norm", "channel_norm")
            found += _block(f"{where}shared {number}: ", *pair, parts=parts)
    own, other = _shapes(model), _shapes(twin)
    found += [f"no {name} {list(own[name])}" for name in own if own[name] != other.get(name)]
    found += [f"a further {name}" for name in other if name not in own]
    return found


class _Side(NamedTuple):
    """A stack of a model, the norm behind it, and what its messages begin with."""

    where: str
    stack: Stack
    norm: Any


def _sides(model: Model) -> list[_Side]:
    """The stacks of a model."""
    if not isinstance(model, EncoderDecoder):
        return [_Side("", model.stack, model.norm)]
    decoder = model.decoder
    return [_Side("", decoder.stack, decoder.norm), _Side("encoder: ", model.encoder, model.encoder_norm)]


def _block(where: str, ours: Any, theirs: Any, *, parts: Sequence[str] = _PARTS) -> list[str]:
    found = []
    for name in parts:
        pair = getattr(ours, name), getattr(theirs, name)
        found += _compare(where + name, *(type(each).__name__ for each in pair))
        if pair[0] is not None and not found:
            found += _part(f"{where}{name}.", *pair)
    activations = [getattr(block.channel, "activation", None) for block in (ours, theirs)]
    return found + ([f"{where}another activation"] if activations[0] is not activations[1] else [])


def _part(where: str, ours: Any, theirs: Any) -> list[str]:
    """The lines for two mixers, channel mixers or norms of one kind, and for mixers inside them."""
    if not isinstance(ours, Parallel):
        return _options(where, ours.config, theirs.config)
    found = _compare(f"{where}branches", list(ours.config.branches), list(theirs.config.branches))
    if found:
        return found
    for name in ours.config.branches:
        pair = getattr(ours, name), getattr(theirs, name)
        found += _compare(where + name, *(type(each).__name__ for each in pair)) or _part(
            f"{where}{name}.", *pair
        )
        for scales in ("scales", "input_scales"):
            values = (getattr(each.config, scales).get(name, 1.0) for each in (ours, theirs))
            found += _compare(f"{where}{scales}.{name}", *values)
    return found


def _options(where: str, ours: Any, theirs: Any) -> list[str]:
    if type(ours) is not type(theirs):
        return [f"{where}{type(theirs).__name__} and the model {type(ours).__name__}"]
    fields = [field.name for field in dataclasses.fields(ours)]
    skipped = _OF_TRAINING | _OF_SHAPES | {"activation"}
    return [
        line
        for name in fields
        if name not in skipped
        for line in _compare(where + name, getattr(ours, name), getattr(theirs, name))
    ]


def _compare(name: str, ours: Any, theirs: Any) -> list[str]:
    return [] if ours == theirs else [f"{name}={theirs!r} and the model {ours!r}"]


def _blocks(stack: Stack) -> list[Block]:
    """The block of each layer; one stands for all layers that are stacked at its place."""
    scanned, period = stack.repeats * len(stack.stacked), max(len(stack.stacked), 1)
    return [
        stack.stacked[layer % period] if layer < scanned else stack.blocks[layer - scanned]
        for layer in range(stack.config.depth)
    ]


def _shapes(model: Model) -> dict[str, tuple[int, ...]]:
    found = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, STORED)):
        names = names_of(path, variable)
        found |= dict.fromkeys(names.names, variable.shape[1:] if names.stacked else variable.shape)
    return found


def _tensors(model: Model, table: Table) -> Iterator[tuple[str, np.ndarray]]:
    """Yields tensors by name, a few at a time from the device."""
    places = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, STORED)):
        names = names_of(path, variable)
        for number, name in enumerate(names.names):
            places[name] = variable, number if names.stacked else None

    def read(name: str) -> np.ndarray:
        variable, number = places[name]
        return np.asarray(variable[...] if number is None else variable[...][number])

    for name, value in table.constants.items():
        if not np.all(read(name) == value):
            raise ValueError(
                f"{name} of the model is not {value:g}, the only value that the architecture has"
            )
    pairs = {pair.ours: pair for pair, _ in table.pairs.values()}
    for pair in pairs.values():
        yield from zip(pair.theirs, pair.save(*map(read, pair.ours)), strict=True)
