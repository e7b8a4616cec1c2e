"""Nystromformer: attention through landmarks, and a filter of values per head."""

from typing import Any

from seqmodels.interop.families.bert import ATTENTION, MLP, family, read_encoder, write_encoder
from seqmodels.interop.families.llama import layer_of
from seqmodels.interop.family import Pair
from seqmodels.interop.options import Options

# A filter is (h, 1, w, 1) with them and (w, h) with us.
FILTER = Pair(
    ("attention.self.conv.weight",),
    ("mixer/filter",),
    lambda x: (x[:, 0, :, 0].T,),
    lambda x: (x.T[:, None, :, None],),
)


def read(options: Options) -> dict[str, Any]:
    """Returns our config.

    Theirs take rows of `segment_means_seq_len` tokens alone, and divide the first iterate of the pseudo-inverse by the largest
    column sum of the whole batch; ours takes rows of any length, and divides by that of each matrix.
    """
    config = read_encoder(options)
    options.only("inv_coeff_init_option", False)
    options.ignore("segment_means_seq_len")
    taps = options.take("conv_kernel_size", 65)
    own = {
        "heads": options.take("num_attention_heads"),
        "bias": True,
        "landmarks": options.take("num_landmarks", 64),
        "taps": taps or 0,
    }
    positions = {"first_position": 2, "max_positions": config["max_positions"] + 2}
    return config | positions | {"pattern": ("nystromformer",), "mixers": {"nystromformer": own}}


def write(model: Any) -> dict[str, Any]:
    """Returns their options, for rows of the length of the table of positions."""
    mixer, longest = layer_of(model, 0).mixer.config, model.config.input.max_positions - 2
    return write_encoder(model) | {
        "max_position_embeddings": longest,
        "segment_means_seq_len": longest - longest % mixer.landmarks,
        "num_attention_heads": mixer.heads,
        "num_landmarks": mixer.landmarks,
        "conv_kernel_size": mixer.taps or None,
    }


NYSTROMFORMER = family(
    "NystromformerForMaskedLM",
    "nystromformer",
    "nystromformer.",
    read=read,
    write=write,
    parts=lambda _: {"nystromformer": (*ATTENTION, FILTER), "mlp": MLP},
)
