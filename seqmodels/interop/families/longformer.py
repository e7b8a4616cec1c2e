"""Longformer: windows, and projections for global tokens, of which a call to theirs says where they stand."""

from typing import Any

from seqmodels.interop.families.bert import ATTENTION, MLP, family, read_encoder, write_encoder
from seqmodels.interop.families.llama import layer_of
from seqmodels.interop.family import linear
from seqmodels.interop.options import Options

GLOBAL = tuple(
    pair
    for name in ("query", "key", "value")
    for pair in linear(f"attention.self.{name}_global", f"mixer/global_{name}")
)


def read(options: Options) -> dict[str, Any]:
    """Returns our config, without global tokens; a config with others, such as 1 for the first one, takes the same weights."""
    config = read_encoder(options, activation="gelu_erf")
    options.ignore("onnx_export")
    windows, depth = options.take("attention_window", 512), config["depth"]
    windows = [windows] * depth if isinstance(windows, int) else list(windows)
    if len(windows) != depth or any(window % 2 or window < 2 for window in windows):
        options.refuse("attention_window", windows, f"an even number for each of {depth} layers")
    common = {
        "mixer": "longformer",
        "heads": options.take("num_attention_heads"),
        "bias": True,
        "global_tokens": 0,
    }
    return config | {
        "pattern": tuple(f"window_{window}" for window in windows),
        "mixers": {f"window_{window}": common | {"window": window // 2} for window in windows},
        "first_position": options.take("pad_token_id", 1) + 1,
    }


def write(model: Any) -> dict[str, Any]:
    """Returns their options."""
    layers = [layer_of(model, layer).mixer.config for layer in range(model.config.stack.depth)]
    return write_encoder(model) | {
        "num_attention_heads": layers[0].heads,
        "attention_window": [2 * layer.window for layer in layers],
        "pad_token_id": model.config.input.first_position - 1,
    }


LONGFORMER = family(
    "LongformerForMaskedLM",
    "longformer",
    "longformer.",
    head="lm_head.",
    read=read,
    write=write,
    parts=lambda _: {"longformer": (*ATTENTION, *GLOBAL), "mlp": MLP},
)
