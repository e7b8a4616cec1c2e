"""RWKV-4: time mixing and channel mixing in turn, which are two blocks of ours each."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from seqmodels.config import StackConfig
from seqmodels.interop.families.llama import mixers_of
from seqmodels.interop.family import Family, Pair, Pairs, linear, norm, same, transposed
from seqmodels.interop.options import Options

PATTERN = ("rwkv4+none", "rwkv_channel+none")


def weights(theirs: tuple[str, ...], ours: str, shape: tuple[int, ...]) -> Pair:
    """Returns the pair of mixing weights per channel, which they hold as arrays of a shape each and we as rows."""
    return Pair(
        theirs,
        (ours,),
        lambda *x: (np.stack([each.reshape(-1) for each in x]),),
        lambda x: tuple(each.reshape(shape) for each in x),
    )


def halves_of(stack: StackConfig) -> Sequence[tuple[int, int]]:
    """Returns the number of the layer that two blocks are halves of, for each block."""
    return [(block // 2, block // 2) for block in range(stack.depth)]


def read(options: Options) -> dict[str, Any]:
    """Returns our config."""
    # In half precision they divide the residual stream by 2 from layer to layer, which norms undo.
    options.ignore("context_length", "rescale_every")
    width, epsilon = options.take("hidden_size"), options.take("layer_norm_epsilon", 1e-5)
    inner = options.take("attention_hidden_size", None) or width
    if inner != width:
        options.refuse("attention_hidden_size", inner, f"hidden_size={width}")
    hidden = options.take("intermediate_size", None) or 4 * width
    return {
        "vocab_size": options.take("vocab_size"),
        "width": width,
        "depth": 2 * options.take("num_hidden_layers"),
        "pattern": PATTERN,
        "mixers": {"rwkv_channel": {"version": 4, "hidden": hidden}},
        "norm": "layer_norm",
        "norm_options": {"epsilon": epsilon},
        "embedding_norm": True,
        "embedding_norm_epsilon": epsilon,
        "tie_embeddings": options.take("tie_word_embeddings", False),
    }


def write(model: Any) -> dict[str, Any]:
    """Returns their options."""
    config, mixers = model.config, mixers_of(model)[1]
    width = config.stack.width
    return {
        "vocab_size": config.input.vocab_size,
        "hidden_size": width,
        "attention_hidden_size": width,
        "num_hidden_layers": config.stack.depth // 2,
        "intermediate_size": mixers["rwkv_channel"].config.size,
        "layer_norm_epsilon": model.norm.config.epsilon,
        "tie_word_embeddings": config.tie_embeddings,
    }


def half(part: str, before: str, names: tuple[str, ...]) -> Pairs:
    """Returns the pairs of the linear maps of one of the two parts of a layer, and of the norm before it."""
    maps = (pair for name in names for pair in linear(f"{part}.{name}", f"mixer/{name}"))
    return *norm(before, "mixer_norm"), *maps


def _parts(stack: StackConfig) -> dict[str, Pairs]:
    shape, time, channel = (1, 1, stack.width), ("key", "value", "receptance"), ("key", "receptance")
    return {
        "rwkv4": (
            *half("attention", "ln1", (*time, "output")),
            same("attention.time_decay", "mixer/log_rate"),
            same("attention.time_first", "mixer/bonus"),
            weights(tuple(f"attention.time_mix_{name}" for name in time), "mixer/mixing", shape),
        ),
        "rwkv_channel": (
            *half("feed_forward", "ln2", time),
            weights(tuple(f"feed_forward.time_mix_{name}" for name in channel), "mixer/mixing", shape),
        ),
    }


RWKV4 = Family(
    "RwkvForCausalLM",
    "rwkv",
    read=read,
    write=write,
    outer=(
        same("rwkv.embeddings.weight", "embedding/table"),
        *norm("rwkv.blocks.0.pre_ln", "embedding/norm"),
        *norm("rwkv.ln_out", "norm"),
        transposed("head.weight", "head/kernel"),
    ),
    layer="rwkv.blocks.{}.",
    parts=_parts,
    base="rwkv.",
    numbers=halves_of,
)
