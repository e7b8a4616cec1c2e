"""Bloom: ALiBi, and a norm of the embeddings."""

from collections.abc import Mapping
from typing import Any

from seqmodels.config import StackConfig
from seqmodels.interop.families.gpt_neox import by_heads
from seqmodels.interop.families.llama import layer_of
from seqmodels.interop.family import Family, Pairs, fused, linear, norm, same, transposed
from seqmodels.interop.options import Options


def read(options: Options) -> dict[str, Any]:
    """Returns our config."""
    options.only("apply_residual_connection_post_layernorm", False)
    options.ignore("slow_but_exact", "seq_length", "skip_bias_add", "skip_bias_add_qkv", "unk_token_id")
    width_name = "hidden_size" if "hidden_size" in options else "n_embed"
    width, epsilon = options.take(width_name), options.take("layer_norm_epsilon", 1e-5)
    heads = options.take("n_head" if "n_head" in options else "num_attention_heads")
    return {
        "vocab_size": options.take("vocab_size"),
        "width": width,
        "depth": options.take("n_layer" if "n_layer" in options else "num_hidden_layers"),
        "pattern": ("attention",),
        "mixers": {"attention": {"heads": heads, "bias": True, "position": "alibi"}},
        "channel": "mlp",
        "channels": {"mlp": {"hidden": 4 * width, "activation": "gelu", "bias": True}},
        "norm": "layer_norm",
        "norm_options": {"epsilon": epsilon},
        "embedding_norm": True,
        "embedding_norm_epsilon": epsilon,
        "tie_embeddings": options.take("tie_word_embeddings", True),
    }


def write(model: Any) -> dict[str, Any]:
    """Returns their options."""
    config = model.config
    return {
        "vocab_size": config.input.vocab_size,
        "hidden_size": config.stack.width,
        "n_layer": config.stack.depth,
        "n_head": layer_of(model, 0).mixer.config.heads,
        "layer_norm_epsilon": model.norm.config.epsilon,
        "tie_word_embeddings": config.tie_embeddings,
    }


def parts(stack: StackConfig) -> Mapping[str, Pairs]:
    """Returns the pairs within a layer."""
    names = ("mixer/query", "mixer/key", "mixer/value")
    return {
        "": (*norm("input_layernorm", "mixer_norm"), *norm("post_attention_layernorm", "channel_norm")),
        "attention": (
            *fused("self_attention.query_key_value", names, by_heads(stack.mixers["attention"]["heads"])),
            *linear("self_attention.dense", "mixer/output"),
        ),
        "mlp": (*linear("mlp.dense_h_to_4h", "channel/up"), *linear("mlp.dense_4h_to_h", "channel/down")),
    }


BLOOM = Family(
    "BloomForCausalLM",
    "bloom",
    read=read,
    write=write,
    outer=(
        same("transformer.word_embeddings.weight", "embedding/table"),
        *norm("transformer.word_embeddings_layernorm", "embedding/norm"),
        *norm("transformer.ln_f", "norm"),
        transposed("lm_head.weight", "head/kernel"),
    ),
    layer="transformer.h.{}.",
    parts=parts,
    base="transformer.",
)
