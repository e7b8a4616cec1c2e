"""BigBird: blocks of a window, the ends and at random, or full attention."""

import math
from typing import Any

from seqmodels.interop.families.bert import ATTENTION, MLP, family, read_encoder, write_encoder
from seqmodels.interop.families.llama import layer_of
from seqmodels.interop.options import Options


def read(options: Options) -> dict[str, Any]:
    """Returns our config; random blocks are drawn by ours, and rows of any length have them.

    Theirs draw none in evaluation, where the first block stands for each of them, and have full attention for short rows.
    """
    config = read_encoder(options)
    options.only("use_bias", True)
    options.ignore("is_decoder")
    scale = math.sqrt(config["width"]) if options.flag("rescale_embeddings", False) else None
    kind = options.take("attention_type", "block_sparse")
    blocks = {"block": options.take("block_size", 64), "random_blocks": options.take("num_random_blocks", 3)}
    own = {"heads": options.take("num_attention_heads"), "bias": True}
    if kind == "block_sparse":
        mixer, own = "bigbird", own | blocks
    elif kind == "original_full":
        mixer, own = "attention", own | {"causal": False, "position": "none"}
    else:
        options.refuse("attention_type", kind, "'block_sparse' or 'original_full'")
    return config | {"pattern": (mixer,), "mixers": {mixer: own}, "embedding_scale": scale}


def write(model: Any) -> dict[str, Any]:
    """Returns their options."""
    mixer = layer_of(model, 0).mixer.config
    sparse = hasattr(mixer, "random_blocks")
    return (
        write_encoder(model)
        | {
            "num_attention_heads": mixer.heads,
            "attention_type": "block_sparse" if sparse else "original_full",
            "rescale_embeddings": model.config.input.embedding_scale is not None,
        }
        | ({"block_size": mixer.block, "num_random_blocks": mixer.random_blocks} if sparse else {})
    )


BIG_BIRD = family(
    "BigBirdForMaskedLM",
    "big_bird",
    "bert.",
    read=read,
    write=write,
    parts=lambda _: {"bigbird": ATTENTION, "attention": ATTENTION, "mlp": MLP},
)
