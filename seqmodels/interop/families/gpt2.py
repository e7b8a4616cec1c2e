"""GPT-2: learned positions, and matrices stored as inputs by outputs."""

from typing import Any

import numpy as np

from seqmodels.interop.families.llama import layer_of
from seqmodels.interop.family import Family, Pair, Pairs, norm, same, transposed
from seqmodels.interop.options import THEIR_ACTIVATIONS, Options

WITHOUT_EFFECT = (
    "add_cross_attention",
    "n_ctx",
    "reorder_and_upcast_attn",
    "summary_activation",
    "summary_first_dropout",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
)


def plain(theirs: str, ours: str) -> Pairs:
    """Returns the pairs of a linear map whose matrix is stored as ours, and of its bias."""
    return same(f"{theirs}.weight", f"{ours}/kernel"), same(f"{theirs}.bias", f"{ours}/bias")


def thirds(theirs: str, ours: tuple[str, ...]) -> Pairs:
    """Returns the pairs of a linear map whose outputs are those of three of ours, one after another, and of its bias."""
    return tuple(
        Pair(
            (f"{theirs}.{kind}",),
            tuple(f"{name}/{own}" for name in ours),
            lambda x: tuple(np.split(x, 3, axis=-1)),
            lambda *x: (np.concatenate(x, axis=-1),),
        )
        for kind, own in (("weight", "kernel"), ("bias", "bias"))
    )


PARTS = {
    "": (*norm("ln_1", "mixer_norm"), *norm("ln_2", "channel_norm")),
    "attention": (
        *thirds("attn.c_attn", ("mixer/query", "mixer/key", "mixer/value")),
        *plain("attn.c_proj", "mixer/output"),
    ),
    "mlp": (*plain("mlp.c_fc", "channel/up"), *plain("mlp.c_proj", "channel/down")),
}


def read(options: Options) -> dict[str, Any]:
    """Returns our config."""
    options.ignore(*WITHOUT_EFFECT)
    options.only("scale_attn_weights", True)
    options.only("scale_attn_by_inverse_layer_idx", False)
    width = options.take("n_embd")
    hidden = options.take("n_inner", None) or 4 * width
    activation = options.activation("activation_function", "gelu_new")
    return {
        "vocab_size": options.take("vocab_size"),
        "width": width,
        "depth": options.take("n_layer"),
        "pattern": ("attention",),
        "mixers": {"attention": {"heads": options.take("n_head"), "bias": True, "position": "none"}},
        "channel": "mlp",
        "channels": {"mlp": {"hidden": hidden, "activation": activation, "bias": True}},
        "norm": "layer_norm",
        "norm_options": {"epsilon": options.take("layer_norm_epsilon", 1e-5)},
        "absolute_positions": "learned",
        "max_positions": options.take("n_positions"),
        "tie_embeddings": options.take("tie_word_embeddings", True),
    }


def write(model: Any) -> dict[str, Any]:
    """Returns their options."""
    config, block = model.config, layer_of(model, 0)
    return {
        "vocab_size": config.input.vocab_size,
        "n_embd": config.stack.width,
        "n_layer": config.stack.depth,
        "n_head": block.mixer.config.heads,
        "n_inner": block.channel.up.kernel.shape[-1],
        "n_positions": config.input.max_positions,
        "activation_function": THEIR_ACTIVATIONS[block.channel.config.activation or "gelu"],
        "layer_norm_epsilon": model.norm.config.epsilon,
        "tie_word_embeddings": config.tie_embeddings,
    }


GPT2 = Family(
    "GPT2LMHeadModel",
    "gpt2",
    read=read,
    write=write,
    outer=(
        same("transformer.wte.weight", "embedding/table"),
        same("transformer.wpe.weight", "embedding/positions"),
        *norm("transformer.ln_f", "norm"),
        transposed("lm_head.weight", "head/kernel"),
    ),
    layer="transformer.h.{}.",
    parts=lambda _: PARTS,
    unread=r"\.attn\.(bias|masked_bias)$",
    base="transformer.",
)
