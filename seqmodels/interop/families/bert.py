"""What encoders in the form of BERT share: embeddings with types, post-norm layers, and the head of a masked language model."""

from typing import Any

from seqmodels.interop.families.llama import layer_of
from seqmodels.interop.family import Family, Pairs, linear, norm, same, transposed
from seqmodels.interop.options import THEIR_ACTIVATIONS, Options

# Outputs of other heads, which no logit depends on, and what is tied to tensors that are read.
UNREAD = r"\.pooler\.|^cls\.seq_relationship\.|position_ids$|(predictions|lm_head)\.decoder\.bias$"
SELF_ATTENTION: Pairs = tuple(
    pair for name in ("query", "key", "value") for pair in linear(f"attention.self.{name}", f"mixer/{name}")
)
ATTENTION: Pairs = (
    *SELF_ATTENTION,
    *linear("attention.output.dense", "mixer/output"),
    *norm("attention.output.LayerNorm", "mixer_norm"),
)
MLP: Pairs = (
    *linear("intermediate.dense", "channel/up"),
    *linear("output.dense", "channel/down"),
    *norm("output.LayerNorm", "channel_norm"),
)
# Of the head: the names of its parts under "cls.predictions.", and those under Longformer's "lm_head.".
HEADS = {
    "cls.predictions.": ("transform.dense", "transform.LayerNorm"),
    "lm_head.": ("dense", "layer_norm"),
}


def outer(base: str, head: str = "cls.predictions.") -> Pairs:
    """Returns the pairs outside of layers, of embeddings under `base` and of a head."""
    embeddings, (dense, inner) = f"{base}embeddings.", HEADS[head]
    return (
        same(f"{embeddings}word_embeddings.weight", "embedding/table"),
        same(f"{embeddings}position_embeddings.weight", "embedding/positions"),
        same(f"{embeddings}token_type_embeddings.weight", "embedding/types"),
        *norm(f"{embeddings}LayerNorm", "embedding/norm"),
        *linear(f"{embeddings}projection", "embedding/projection"),
        *linear(f"{head}{dense}", "transform"),
        *norm(f"{head}{inner}", "transform_norm"),
        same(f"{head}bias", "bias"),
        transposed(f"{head}decoder.weight", "head/kernel"),
    )


def read_encoder(options: Options, *, activation: str | None = None) -> dict[str, Any]:
    """Returns our config but for mixers and their pattern.

    Args:
      activation: the activation of the head; that of the layers if None.
    """
    epsilon, inside = options.take("layer_norm_eps", 1e-12), options.activation("hidden_act")
    options.ignore("hidden_dropout_prob", "sep_token_id", "add_cross_attention", "use_cache")
    return {
        "kind": "masked_language_model",
        "vocab_size": options.take("vocab_size"),
        "width": options.take("hidden_size"),
        "depth": options.take("num_hidden_layers"),
        "channel": "mlp",
        "channels": {
            "mlp": {"hidden": options.take("intermediate_size"), "activation": inside, "bias": True}
        },
        "norm": "layer_norm",
        "norm_options": {"epsilon": epsilon},
        "norm_position": "post",
        "final_norm": False,
        "absolute_positions": "learned",
        "max_positions": options.take("max_position_embeddings"),
        "token_types": options.take("type_vocab_size"),
        "embedding_norm": True,
        "embedding_norm_epsilon": epsilon,
        "embedding_norm_place": "sum",
        "tie_embeddings": options.take("tie_word_embeddings", True),
        "transform": activation or inside,
        "transform_epsilon": epsilon,
    }


def write_encoder(model: Any) -> dict[str, Any]:
    """Returns their options but for those of attention."""
    config, block = model.config, layer_of(model, 0)
    return {
        "vocab_size": config.input.vocab_size,
        "hidden_size": config.stack.width,
        "num_hidden_layers": config.stack.depth,
        "intermediate_size": block.channel.up.kernel.shape[-1],
        "hidden_act": THEIR_ACTIVATIONS[block.channel.config.activation or "gelu"],
        "layer_norm_eps": config.transform_epsilon,
        "max_position_embeddings": config.input.max_positions,
        "type_vocab_size": config.input.token_types,
        "tie_word_embeddings": config.tie_embeddings,
    }


def family(architecture: str, model_type: str, base: str, **options: Any) -> Family:
    """Returns a family of masked language models whose layers stand under `base`."""
    head = options.pop("head", "cls.predictions.")
    return Family(
        architecture,
        model_type,
        outer=outer(base, head),
        layer=base + "encoder.layer.{}.",
        unread=UNREAD,
        base=base,
        **options,
    )
