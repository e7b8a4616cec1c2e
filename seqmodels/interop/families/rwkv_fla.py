"""RWKV-6 and RWKV-7 in the format of flash-linear-attention: time mixing and channel mixing, two blocks of ours each."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from seqmodels.config import StackConfig
from seqmodels.interop.families.flash_linear_attention import WITHOUT_EFFECT
from seqmodels.interop.families.llama import layer_of, shortest
from seqmodels.interop.families.rwkv import halves_of, weights
from seqmodels.interop.family import Family, Pair, Pairs, linear, norm, same, transposed
from seqmodels.interop.options import Options

MAPS = {"r_proj": "receptance", "k_proj": "key", "v_proj": "value", "o_proj": "output"}
# Their order of the streams w, k, v, r and g of RWKV-6, which is r, w, k, v, g.
ORDER = (1, 2, 3, 0, 4)


def _read(
    options: Options, *, version: int, own: Callable[[Options, int, float], dict[str, Any]]
) -> dict[str, Any]:
    options.ignore(*WITHOUT_EFFECT)
    options.only("attn", None)
    options.only("norm_first", True)
    options.only("norm_bias", True)
    options.only("hidden_act", "sqrelu")
    width, epsilon = options.take("hidden_size"), options.take("norm_eps", 1e-5)
    hidden, ratio = options.take("intermediate_size", None), options.take("hidden_ratio", None)
    if hidden is None:
        hidden = -(-int(width * (ratio or (3.5 if version == 6 else 4))) // 32) * 32
    layers = options.take("num_hidden_layers")
    mixers = own(options, width, epsilon)
    first, *_, later = (*mixers, *mixers)
    names = [first, *[later] * (layers - 1)]
    channel = {"version": version, "hidden": hidden}
    return {
        "vocab_size": options.take("vocab_size"),
        "width": width,
        "depth": 2 * layers,
        "pattern": shortest([f"{part}+none" for name in names for part in (name, "rwkv_channel")]),
        "mixers": mixers | {"rwkv_channel": channel},
        "norm": "layer_norm",
        "norm_options": {"epsilon": epsilon},
        "embedding_norm": True,
        "embedding_norm_epsilon": epsilon,
        "tie_embeddings": options.take("tie_word_embeddings", False),
    }


def _write(model: Any, *, own: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    config = model.config
    return {
        "vocab_size": config.input.vocab_size,
        "hidden_size": config.stack.width,
        "num_hidden_layers": config.stack.depth // 2,
        "intermediate_size": layer_of(model, 1).mixer.config.size,
        "norm_eps": model.norm.config.epsilon,
        "tie_word_embeddings": config.tie_embeddings,
    } | own(layer_of(model, 2 if config.stack.depth > 2 else 0).mixer.config)


def _read6(options: Options, width: int, epsilon: float) -> dict[str, Any]:
    """Returns the options of the mixers of the first layer and, if they differ, of the later ones."""
    options.only("expand_k", 1.0, 1)
    options.only("expand_v", 1.0, 1)
    heads = options.take("num_heads", 4)
    if width % heads:
        options.refuse("num_heads", heads, f"a divisor of hidden_size={width}")
    mixer = {
        "head_dim": width // heads,
        "mix_rank": options.take("proj_low_rank_dim", 32),
        "decay_rank": options.take("gate_low_rank_dim", 64),
        "epsilon": epsilon,
    }
    return {"rwkv6": mixer}


def _write6(own: Any) -> dict[str, Any]:
    return {
        "expand_k": 1.0,
        "expand_v": 1.0,
        "num_heads": own.heads,
        "proj_low_rank_dim": own.mix_rank,
        "gate_low_rank_dim": own.decay_rank,
    }


def _read7(options: Options, width: int, epsilon: float) -> dict[str, Any]:
    layers = options.take("num_hidden_layers")
    size, heads = options.take("head_dim", 64), options.take("num_heads", None)
    size = size or width // heads
    if heads not in (None, width // size):
        options.refuse("num_heads", heads, f"hidden_size / head_dim = {width // size}")
    options.only("value_dim", None, width, [width] * layers)
    mixer = {
        "mixer": "rwkv7",
        "head_dim": size,
        "decay_rank": options.take("decay_low_rank_dim", 64),
        "rate_rank": options.take("a_low_rank_dim", 64),
        "gate_rank": options.take("gate_low_rank_dim", 128),
        "epsilon": epsilon,
    }
    later = mixer | {"value_residual": True, "value_rank": options.take("v_low_rank_dim", 16)}
    return {"first": mixer, "later": later} if layers > 1 else {"first": mixer}


def _write7(own: Any) -> dict[str, Any]:
    decay, rate, gate, value = own.ranks
    return {
        "head_dim": own.head_dim,
        "decay_low_rank_dim": decay,
        "a_low_rank_dim": rate,
        "gate_low_rank_dim": gate,
        "v_low_rank_dim": value,
    }


def _low_rank(theirs: str, ours: str) -> Pairs:
    return *linear(f"{theirs}.lora.0", f"{ours}/inner"), *linear(f"{theirs}.lora.2", f"{ours}/outer")


def _maps(suffix: str, names: Mapping[str, str]) -> Pairs:
    """Returns the pairs of linear maps, of which all but that of outputs have a suffix to their names."""
    found = ((theirs + ("" if theirs == "o_proj" else suffix), ours) for theirs, ours in names.items())
    return tuple(pair for theirs, ours in found for pair in linear(f"attn.{theirs}", f"mixer/{ours}"))


def _mixing6(stack: StackConfig) -> Pairs:
    """Returns the pairs of the map from inputs to mixing weights; the streams have another order with them."""
    back, count, rank = np.argsort(ORDER), len(ORDER), stack.mixers["rwkv6"]["mix_rank"]

    def load_in(x):
        return (x.reshape(count, rank, -1)[list(ORDER)].reshape(x.shape).T,)

    def save_in(x):
        return (x.T.reshape(count, rank, -1)[back].reshape(x.T.shape),)

    return (
        Pair(
            ("attn.x_proj.0.mu", "attn.x_bias"),
            ("mixer/mixing",),
            lambda mu, bias: (np.concatenate([mu[None], bias[list(ORDER)]]),),
            lambda x: (x[0], x[1:][back]),
        ),
        Pair(("attn.x_proj.0.linear.weight",), ("mixer/mix_in",), load_in, save_in),
        Pair(
            ("attn.x_proj.2.weight",),
            ("mixer/mix_out",),
            lambda x: (np.moveaxis(x.reshape(-1, count, rank), 0, 2)[list(ORDER)],),
            lambda x: (np.moveaxis(x[back], 2, 0).reshape(x.shape[2], -1),),
        ),
    )


def _parts6(stack: StackConfig) -> Mapping[str, Pairs]:
    return {
        "rwkv6": (
            *norm("attn_norm", "mixer_norm"),
            *_maps(".linear", MAPS | {"g_proj": "gate"}),
            *_low_rank("attn.w_proj.linear", "mixer/decay"),
            *_mixing6(stack),
            same("attn.bonus", "mixer/bonus"),
            *norm("attn.g_norm", "mixer/norm"),
        ),
        "rwkv_channel": (
            *norm("ffn_norm", "mixer_norm"),
            *linear("ffn.key.linear", "mixer/key"),
            *linear("ffn.receptance.linear", "mixer/receptance"),
            *linear("ffn.value", "mixer/value"),
            weights(("ffn.key.mu", "ffn.receptance.mu"), "mixer/mixing", (stack.width,)),
        ),
    }


def _parts7(stack: StackConfig) -> Mapping[str, Pairs]:
    maps = {"w_lora": "decay", "a_lora": "rate", "g_lora": "gate", "v_lora": "share"}
    names = tuple(f"attn.x_{stream}" for stream in ("r", "w", "k", "v", "a", "g"))
    return {
        "rwkv7": (
            *norm("attn_norm", "mixer_norm"),
            *_maps("", MAPS),
            *(pair for theirs, ours in maps.items() for pair in _low_rank(f"attn.{theirs}", f"mixer/{ours}")),
            weights(names, "mixer/mixing", (1, 1, stack.width)),
            same("attn.k_k", "mixer/removal"),
            same("attn.k_a", "mixer/replacement"),
            same("attn.r_k", "mixer/bonus"),
            *norm("attn.g_norm", "mixer/norm"),
        ),
        "rwkv_channel": (
            *norm("ffn_norm", "mixer_norm"),
            *linear("ffn.key", "mixer/key"),
            *linear("ffn.value", "mixer/value"),
            weights(("ffn.x_k",), "mixer/mixing", (stack.width,)),
        ),
    }


def _family(
    version: int,
    read: Callable[[Options, int, float], dict[str, Any]],
    write: Callable[[Any], dict[str, Any]],
    parts: Callable[[StackConfig], Mapping[str, Pairs]],
) -> Family:
    return Family(
        f"RWKV{version}ForCausalLM",
        f"rwkv{version}",
        read=partial(_read, version=version, own=read),
        write=partial(_write, own=write),
        outer=(
            same("model.embeddings.weight", "embedding/table"),
            *norm("model.layers.0.pre_norm", "embedding/norm"),
            *norm("model.norm", "norm"),
            transposed("lm_head.weight", "head/kernel"),
        ),
        layer="model.layers.{}.",
        parts=parts,
        numbers=halves_of,
    )


RWKV6 = _family(6, _read6, _write6, _parts6)
RWKV7 = _family(7, _read7, _write7, _parts7)
