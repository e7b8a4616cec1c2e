"""MPT: ALiBi without any bias."""

from typing import Any

import numpy as np

from seqmodels.interop.families.llama import layer_of
from seqmodels.interop.family import Family, fused, linear, norm, same
from seqmodels.interop.options import Options

WITHOUT_EFFECT = (
    "emb_pdrop",
    "embedding_fraction",
    "init_device",
    "max_seq_len",
    "norm_type",
    "verbose",
    "init_config",
)
# Of attention: what has one value here, and what changes no output.
FIXED = {
    "attn_type": "multihead_attention",
    "clip_qkv": None,
    "prefix_lm": False,
    "qk_ln": False,
    "alibi_bias_max": 8,
}


def thirds(count: int) -> list[np.ndarray]:
    """Returns the order of queries, keys and values one after another."""
    return np.split(np.arange(count), 3)


PARTS = {
    "": (*norm("norm_1", "mixer_norm"), *norm("norm_2", "channel_norm")),
    "attention": (
        *fused("attn.Wqkv", ("mixer/query", "mixer/key", "mixer/value"), thirds),
        *linear("attn.out_proj", "mixer/output"),
    ),
    "mlp": (*linear("ffn.up_proj", "channel/up"), *linear("ffn.down_proj", "channel/down")),
}


def read(options: Options) -> dict[str, Any]:
    """Returns our config."""
    options.ignore(*WITHOUT_EFFECT, "learned_pos_emb")  # no table where there is ALiBi
    options.only("no_bias", True)
    options.only("logit_scale", None)
    options.only("tie_word_embeddings", True)
    attention = options.take("attn_config", None) or {}
    if not attention.get("alibi", True):
        options.refuse("attn_config.alibi", False, "True")
    for name, value in FIXED.items():
        if attention.get(name, value) != value:
            options.refuse(f"attn_config.{name}", attention[name], repr(value))
    width, heads = options.take("d_model"), options.take("n_heads")
    if heads & (heads - 1):
        options.refuse("n_heads", heads, "a power of two, as slopes are in another order otherwise")
    own = {"heads": heads, "position": "alibi", "scale": attention.get("softmax_scale")}
    # Their MLP has four times the width whatever the ratio.
    options.ignore("expansion_ratio")
    return {
        "vocab_size": options.take("vocab_size"),
        "width": width,
        "depth": options.take("n_layers"),
        "pattern": ("attention",),
        "mixers": {"attention": own},
        "channel": "mlp",
        "channels": {"mlp": {"hidden": 4 * width, "activation": "gelu_erf"}},
        "norm": "layer_norm",
        "norm_options": {"epsilon": options.take("layer_norm_epsilon", 1e-5), "bias": False},
        "tie_embeddings": True,
    }


def write(model: Any) -> dict[str, Any]:
    """Returns their options."""
    config, attention = model.config, layer_of(model, 0).mixer.config
    return {
        "vocab_size": config.input.vocab_size,
        "d_model": config.stack.width,
        "n_layers": config.stack.depth,
        "n_heads": attention.heads,
        "no_bias": True,
        "layer_norm_epsilon": model.norm.config.epsilon,
        "attn_config": {"alibi": True, "softmax_scale": attention.scale},
    }


MPT = Family(
    "MptForCausalLM",
    "mpt",
    read=read,
    write=write,
    outer=(same("transformer.wte.weight", "embedding/table"), *norm("transformer.norm_f", "norm")),
    layer="transformer.blocks.{}.",
    parts=lambda _: PARTS,
    base="transformer.",
)
