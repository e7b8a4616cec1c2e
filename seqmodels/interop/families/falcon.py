"""Falcon: attention and MLP side by side, with one norm and one key and value head, or with two norms and several."""

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
    options.only("alibi", False)
    options.ignore("n_embed", "n_head", "n_layer", "num_kv_heads")
    width, heads = options.take("hidden_size"), options.take("num_attention_heads")
    new = options.take("new_decoder_architecture", False)
    shared = options.take("multi_query", True)
    parallel = options.take("parallel_attn", True) or new
    norms = options.take("num_ln_in_parallel_attn", None) or (2 if new else 1)
    given = options.take("num_kv_heads", None) or heads
    bias, epsilon = options.take("bias", False), options.take("layer_norm_epsilon", 1e-5)
    attention = {
        "heads": heads,
        "kv_heads": given if new or not shared else 1,
        "bias": bias,
        "position": read_rope(options),
    }
    channel = {
        "hidden": options.take("ffn_hidden_size", None) or 4 * width,
        "activation": options.activation("activation", "gelu"),
        "bias": bias,
    }
    return {
        "vocab_size": options.take("vocab_size"),
        "width": width,
        "depth": options.take("num_hidden_layers"),
        "pattern": ("attention",),
        "mixers": {"attention": attention},
        "channel": "mlp",
        "channels": {"mlp": channel},
        "residual": "parallel" if parallel else "separate",
        "shared_norm": parallel and norms == 1,
        "norm": "layer_norm",
        "norm_options": {"epsilon": epsilon},
        "tie_embeddings": options.take("tie_word_embeddings", True),
    }


def write(model: Any) -> dict[str, Any]:
    """Returns their options."""
    config, block = model.config, layer_of(model, 0)
    own, stack = block.mixer.config, config.stack
    parallel = stack.residual == "parallel"
    # The first releases have one key and value head, or as many as queries; others are of the second.
    new = parallel and (not stack.shared_norm or own.groups not in (1, own.heads))
    return {
        "vocab_size": config.input.vocab_size,
        "hidden_size": stack.width,
        "num_hidden_layers": stack.depth,
        "num_attention_heads": own.heads,
        "num_kv_heads": own.groups,
        "multi_query": own.groups == 1,
        "parallel_attn": parallel,
        "new_decoder_architecture": new,
        "num_ln_in_parallel_attn": (1 if stack.shared_norm else 2) if new else None,
        "bias": own.bias,
        "ffn_hidden_size": block.channel.up.kernel.shape[-1],
        "activation": THEIR_ACTIVATIONS[block.channel.config.activation or "gelu"],
        "layer_norm_epsilon": model.norm.config.epsilon,
        "rope_parameters": write_rope(own.position),
        "alibi": False,
        "tie_word_embeddings": config.tie_embeddings,
    }


def parts(stack: StackConfig) -> Mapping[str, Pairs]:
    """Returns the pairs within a layer."""
    own = stack.mixers["attention"]
    groups, each = own["kv_heads"], own["heads"] // own["kv_heads"]

    def by_group(count: int) -> list[np.ndarray]:
        """Queries, the key and the value of each group after another."""
        places = np.arange(count).reshape(groups, each + 2, -1)
        return [places[:, part].ravel() for part in (slice(each), each, each + 1)]

    parallel = stack.residual == "parallel"
    first = "input_layernorm" if stack.shared_norm or not parallel else "ln_attn"
    second = "ln_mlp" if parallel else "post_attention_layernorm"
    return {
        "": (*norm(first, "mixer_norm"), *norm(second, "channel_norm")),
        "attention": (
            *fused("self_attention.query_key_value", ("mixer/query", "mixer/key", "mixer/value"), by_group),
            *linear("self_attention.dense", "mixer/output"),
        ),
        "mlp": (*linear("mlp.dense_h_to_4h", "channel/up"), *linear("mlp.dense_4h_to_h", "channel/down")),
    }


FALCON = Family(
    "FalconForCausalLM",
    "falcon",
    read=read,
    write=write,
    outer=(
        same("transformer.word_embeddings.weight", "embedding/table"),
        *norm("transformer.ln_f", "norm"),
        transposed("lm_head.weight", "head/kernel"),
    ),
    layer="transformer.h.{}.",
    parts=parts,
    base="transformer.",
)
