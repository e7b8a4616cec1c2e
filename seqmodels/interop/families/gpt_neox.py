"""GPT-NeoX, the architecture of Pythia: attention and MLP of each layer side by side."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from seqmodels.config import StackConfig
from seqmodels.interop.families.llama import layer_of
from seqmodels.interop.family import Family, Pairs, fused, linear, norm, same, transposed
from seqmodels.interop.options import THEIR_ACTIVATIONS, Options
from seqmodels.interop.rope import read_rope, write_rope


def read(options: Options) -> dict[str, Any]:
    """Returns our config."""
    heads, width = options.take("num_attention_heads"), options.take("hidden_size")
    fraction = options.take("rotary_pct", None)
    position = read_rope(options, base=options.take("rotary_emb_base", None), fraction=fraction, partial=True)
    bias = options.take("attention_bias", True)
    attention = {"heads": heads, "head_dim": width // heads, "bias": bias, "position": position}
    hidden, activation = options.take("intermediate_size"), options.activation("hidden_act", "gelu")
    return {
        "vocab_size": options.take("vocab_size"),
        "width": width,
        "depth": options.take("num_hidden_layers"),
        "pattern": ("attention",),
        "mixers": {"attention": attention},
        "channel": "mlp",
        "channels": {"mlp": {"hidden": hidden, "activation": activation, "bias": True}},
        "residual": "parallel" if options.take("use_parallel_residual", True) else "separate",
        "norm": "layer_norm",
        "norm_options": {"epsilon": options.take("layer_norm_eps", 1e-5)},
        "tie_embeddings": options.take("tie_word_embeddings", False),
    }


def write(model: Any) -> dict[str, Any]:
    """Returns their options."""
    config, block = model.config, layer_of(model, 0)
    return {
        "vocab_size": config.input.vocab_size,
        "hidden_size": config.stack.width,
        "num_hidden_layers": config.stack.depth,
        "num_attention_heads": block.mixer.config.heads,
        "attention_bias": block.mixer.config.bias,
        "intermediate_size": block.channel.up.kernel.shape[-1],
        "hidden_act": THEIR_ACTIVATIONS[block.channel.config.activation or "gelu"],
        "use_parallel_residual": config.stack.residual == "parallel",
        "layer_norm_eps": model.norm.config.epsilon,
        "rope_parameters": write_rope(block.mixer.config.position),
        "tie_word_embeddings": config.tie_embeddings,
    }


def by_heads(heads: int):
    """Returns the order of queries, keys and values in one map that gives the three of each head after another."""

    def orders(count: int) -> list[np.ndarray]:
        places = np.arange(count).reshape(heads, 3, -1)
        return [places[:, part].ravel() for part in range(3)]

    return orders


def parts(stack: StackConfig) -> Mapping[str, Pairs]:
    """Returns the pairs within a layer."""
    heads = stack.mixer_of(0)[1]["heads"]
    names = ("mixer/query", "mixer/key", "mixer/value")
    return {
        "": (*norm("input_layernorm", "mixer_norm"), *norm("post_attention_layernorm", "channel_norm")),
        "attention": (
            *fused("attention.query_key_value", names, by_heads(heads)),
            *linear("attention.dense", "mixer/output"),
        ),
        "mlp": (*linear("mlp.dense_h_to_4h", "channel/up"), *linear("mlp.dense_4h_to_h", "channel/down")),
    }


GPT_NEOX = Family(
    "GPTNeoXForCausalLM",
    "gpt_neox",
    read=read,
    write=write,
    outer=(
        same("gpt_neox.embed_in.weight", "embedding/table"),
        *norm("gpt_neox.final_layer_norm", "norm"),
        transposed("embed_out.weight", "head/kernel"),
    ),
    layer="gpt_neox.layers.{}.",
    parts=parts,
    unread=r"attention\.(bias|masked_bias|rotary_emb\.inv_freq)$",
    base="gpt_neox.",
)
