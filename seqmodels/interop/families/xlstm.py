"""xLSTM 7B: mLSTM layers, each followed by a gated linear unit."""

import dataclasses
from typing import Any

from seqmodels.config import StackConfig
from seqmodels.interop.families.llama import layer_of
from seqmodels.interop.family import Family, Pairs, linear, merged, norm, same, transposed
from seqmodels.interop.options import Options

# Which code runs, in which precision and in what pieces.
WITHOUT_EFFECT = (
    "add_embedding_dropout",
    "add_forward_backend_padding",
    "autocast_kernel_dtype",
    "chunk_size",
    "chunkwise_kernel",
    "igate_bias_init_range",
    "inference_state_dtype",
    "max_inference_chunksize",
    "mode",
    "norm_reduction_force_float32",
    "return_last_states",
    "sequence_kernel",
    "step_kernel",
)


def read(options: Options) -> dict[str, Any]:
    """Returns our config."""
    options.ignore(*WITHOUT_EFFECT)
    options.only("use_bias", False)
    options.only("add_out_norm", True)
    options.only("weight_mode", "single", "fused")
    options.only("eps", 1e-6)
    width = options.take("hidden_size", None) or options.take("embedding_dim")
    depth = options.take("num_hidden_layers", None) or options.take("num_blocks")
    options.only("embedding_dim", width)
    options.only("num_blocks", depth)
    heads, epsilon = options.take("num_heads", 8), options.take("norm_eps", 1e-6)
    own = {"heads": heads, "gate_cap": float(options.take("gate_soft_cap", 15.0)), "epsilon": epsilon}
    for name, ours, default in (("qk_dim_factor", "key_dim", 0.5), ("v_dim_factor", "value_dim", 1.0)):
        size = int(width * options.take(name, default))
        if size % heads:
            options.refuse(name, options.take(name, default), f"one that num_heads={heads} divides")
        own[ours] = size // heads
    options.only("head_dim", own["value_dim"])
    multiple = options.take("ffn_round_up_to_multiple_of", 64)
    hidden = int((width * options.take("ffn_proj_factor", 2.667) + multiple - 1) // multiple * multiple)
    return {
        "vocab_size": options.take("vocab_size"),
        "width": width,
        "depth": depth,
        "pattern": ("xlstm7b",),
        "mixers": {"xlstm7b": own},
        "channel": "swiglu",
        "channels": {"swiglu": {"hidden": hidden}},
        "norm": "rms_norm",
        "norm_options": {"epsilon": epsilon},
        "logit_cap": float(options.take("output_logit_soft_cap", 30.0)),
        "tie_embeddings": options.take("tie_word_embeddings", False),
    }


def _factor(size: int, width: int) -> float:
    """Returns a factor whose product with the width is `size` when it is rounded down."""
    factor = size / width
    return factor if int(width * factor) == size else (size + 0.5) / width


def write(model: Any) -> dict[str, Any]:
    """Returns their options."""
    config, block = model.config, layer_of(model, 0)
    own, width, depth = block.mixer.config, config.stack.width, config.stack.depth
    key, value = own.sizes
    return {
        "vocab_size": config.input.vocab_size,
        "hidden_size": width,
        "embedding_dim": width,
        "num_hidden_layers": depth,
        "num_blocks": depth,
        "num_heads": own.heads,
        "qk_dim_factor": _factor(own.heads * key, width),
        "v_dim_factor": _factor(own.heads * value, width),
        "ffn_proj_factor": _factor(block.channel.up.kernel.shape[-1], width),
        "ffn_round_up_to_multiple_of": 1,
        "gate_soft_cap": own.gate_cap,
        "output_logit_soft_cap": config.logit_cap,
        "norm_eps": model.norm.config.epsilon,
        "weight_mode": "single",
        "tie_word_embeddings": config.tie_embeddings,
    }


def _gates(heads: int) -> Pairs:
    """Returns the pairs of the gates, two maps with biases that are one with us."""
    names = tuple(f"mlstm_layer.{name}gate_preact" for name in "if")
    kernel = merged(names, "mixer/gates", (heads, heads))
    biases = tuple(f"{name}.bias" for name in names)
    return kernel, dataclasses.replace(kernel, theirs=biases, ours=("mixer/gates/bias",))


def _joined(stack: StackConfig) -> dict[str, dict[str, int]]:
    """Returns the parts of the maps that are one with weight_mode="fused"."""
    own, hidden = stack.mixers["xlstm7b"], stack.channels["swiglu"]["hidden"]
    heads, keys, values = own["heads"], own["heads"] * own["key_dim"], own["heads"] * own["value_dim"]
    return {
        r"\bqkv_opreact\b": {"q": keys, "k": keys, "v": values, "ogate_preact": values},
        r"\bifgate_preact\b": {"igate_preact": heads, "fgate_preact": heads},
        r"\bproj_up_gate_z\b": {"proj_up_gate": hidden, "proj_up": hidden},
    }


XLSTM = Family(
    "xLSTMForCausalLM",
    "xlstm",
    read=read,
    write=write,
    outer=(
        same("backbone.embeddings.weight", "embedding/table"),
        *norm("backbone.out_norm", "norm"),
        transposed("lm_head.weight", "head/kernel"),
    ),
    layer="backbone.blocks.{}.",
    parts=lambda stack: {
        "": (*norm("norm_mlstm", "mixer_norm"), *norm("norm_ffn", "channel_norm")),
        "xlstm7b": (
            *linear("mlstm_layer.q", "mixer/query"),
            *linear("mlstm_layer.k", "mixer/key"),
            *linear("mlstm_layer.v", "mixer/value"),
            *linear("mlstm_layer.ogate_preact", "mixer/gate"),
            *_gates(stack.mixers["xlstm7b"]["heads"]),
            *norm("mlstm_layer.multihead_norm", "mixer/norm"),
            *linear("mlstm_layer.out_proj", "mixer/output"),
        ),
        "swiglu": (
            *linear("ffn.proj_up_gate", "channel/gate"),
            *linear("ffn.proj_up", "channel/up"),
            *linear("ffn.proj_down", "channel/down"),
        ),
    },
    base="backbone.",
    joined=_joined,
)
