"""FNet: Fourier transforms in place of attention, behind a linear map of the embeddings."""

from typing import Any

from seqmodels.interop.families.bert import MLP, family, read_encoder, write_encoder
from seqmodels.interop.family import norm
from seqmodels.interop.options import Options


def read(options: Options) -> dict[str, Any]:
    """Returns our config."""
    # How the same transform is computed.
    options.ignore("use_tpu_fourier_optimizations", "tpu_short_seq_length")
    return read_encoder(options) | {"pattern": ("fnet",), "embedding_map": True}


FNET = family(
    "FNetForMaskedLM",
    "fnet",
    "fnet.",
    read=read,
    write=write_encoder,
    parts=lambda _: {"": norm("fourier.output.LayerNorm", "mixer_norm"), "mlp": MLP},
)
