"""Llama, Mistral, Qwen2 and Qwen3: pre-norm decoders of rotary attention and gated linear units."""

from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

from seqmodels.interop.family import Family, linear, norm, same, transposed
from seqmodels.interop.options import THEIR_ACTIVATIONS, Options
from seqmodels.interop.rope import UNKNOWN_LENGTH, read_rope, write_rope

OUTER = (
    same("model.embed_tokens.weight", "embedding/table"),
    *norm("model.norm", "norm"),
    transposed("lm_head.weight", "head/kernel"),
)
NORMS = (
    *norm("input_layernorm", "mixer_norm"),
    *norm("post_attention_layernorm", "channel_norm"),
)
ATTENTION = (
    *linear("self_attn.q_proj", "mixer/query"),
    *linear("self_attn.k_proj", "mixer/key"),
    *linear("self_attn.v_proj", "mixer/value"),
    *linear("self_attn.o_proj", "mixer/output"),
    *norm("self_attn.q_norm", "mixer/query_norm"),
    *norm("self_attn.k_norm", "mixer/key_norm"),
)
GLU = (
    *linear("mlp.gate_proj", "channel/gate"),
    *linear("mlp.up_proj", "channel/up"),
    *linear("mlp.down_proj", "channel/down"),
)
PARTS = {"": NORMS, "attention": ATTENTION, "swiglu": GLU}


def read_sizes(options: Options, *, tied: bool = False) -> dict[str, Any]:
    """Returns the fields of a decoder that these names give: sizes, norm and tied embeddings."""
    return {
        "vocab_size": options.take("vocab_size"),
        "width": options.take("hidden_size"),
        "depth": options.take("num_hidden_layers"),
        "norm": "rms_norm",
        "norm_options": {"epsilon": options.take("rms_norm_eps", 1e-6)},
        "tie_embeddings": options.take("tie_word_embeddings", tied),
    }


def read_heads(options: Options) -> dict[str, Any]:
    """Returns the options of attention that these names give: numbers and sizes of heads."""
    heads = options.take("num_attention_heads")
    return {
        "heads": heads,
        "kv_heads": options.take("num_key_value_heads", None) or heads,
        "head_dim": options.take("head_dim", None) or options.take("hidden_size") // heads,
    }


def write_sizes(model: Any) -> dict[str, Any]:
    """Returns the options that `read_sizes` reads."""
    config = model.config
    return {
        "vocab_size": config.input.vocab_size,
        "hidden_size": config.stack.width,
        "num_hidden_layers": config.stack.depth,
        "rms_norm_eps": model.norm.config.epsilon,
        "tie_word_embeddings": config.tie_embeddings,
    }


def write_heads(attention: Any) -> dict[str, Any]:
    """Returns the options that `read_heads` reads."""
    config = attention.config
    return {
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.groups,
        "head_dim": config.size,
        "max_position_embeddings": getattr(config.position, "length", None) or UNKNOWN_LENGTH,
    }


def mixers_of(model: Any) -> tuple[list[str], dict[str, Any]]:
    """Returns the name of the mixer of each layer, and the first mixer of each name."""
    stack = model.config.stack
    names = [stack.mixer_of(layer)[0] for layer in range(stack.depth)]
    return names, {name: layer_of(model, names.index(name)).mixer for name in names}


def layer_of(model: Any, layer: int) -> Any:
    """Returns the block of a layer, or the one that stands for it in a stack of several."""
    stack = model.stack
    scanned = stack.repeats * len(stack.stacked)
    return stack.stacked[layer % len(stack.stacked)] if layer < scanned else stack.blocks[layer - scanned]


def _read(options: Options, *, biases: str, qk_norm: bool, switch: bool) -> dict[str, Any]:
    sizes = read_sizes(options)
    attention = read_heads(options) | {"position": read_rope(options)}
    if biases in ("all", "attention"):
        attention["bias"] = options.take("attention_bias", False)
    elif biases == "inputs":
        attention |= {"bias": True, "output_bias": False}
    if qk_norm:
        attention |= {"qk_norm": True, "norm_epsilon": sizes["norm_options"]["epsilon"]}
    window = options.take("sliding_window", None)
    if switch and not options.take("use_sliding_window", False):
        window = None
    kinds = None
    if switch:
        first = sizes["depth"] if window is None else options.take("max_window_layers", 28)
        options.ignore("max_window_layers")
        kinds = [
            "full_attention" if layer < first else "sliding_attention" for layer in range(sizes["depth"])
        ]
    pattern, mixers = windowed(options, attention, window, sizes["depth"], kinds=kinds)
    channel = {
        "hidden": options.take("intermediate_size"),
        "activation": options.activation("hidden_act", "silu"),
    }
    if biases == "all":
        channel["bias"] = options.take("mlp_bias", False)
    return sizes | {
        "pattern": pattern,
        "mixers": mixers,
        "channel": "swiglu",
        "channels": {"swiglu": channel},
    }


def windowed(
    options: Options,
    attention: dict[str, Any],
    window: int | None,
    depth: int,
    *,
    kinds: Sequence[str] | None = None,
    local: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Returns the pattern and the mixers of layers with and without a window.

    Args:
      attention: options of both.
      window: the window, if some layers have one.
      kinds: kind of each layer where "layer_types" does not list them; if None, all have the window, if there is one.
      local: further options of layers with a window.
    """
    if kinds is None:
        kinds = ["full_attention" if window is None else "sliding_attention"] * depth
    kinds = options.take("layer_types", None) or kinds
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            options.refuse("layer_types", kind, "full_attention or sliding_attention")
    if window is None and "sliding_attention" in kinds:
        options.refuse("layer_types", "sliding_attention", "full_attention, as there is no window")
    if len(kinds) != depth:
        options.refuse("layer_types", kinds, f"one for each of num_hidden_layers={depth}")
    own = {"attention": attention, "local": {"mixer": "attention", **attention, **local, "window": window}}
    names = {"full_attention": "attention", "sliding_attention": "local"}
    pattern = shortest([names[kind] for kind in kinds])
    return pattern, {name: own[name] for name in pattern}


def shortest(names: Sequence[Any]) -> tuple[Any, ...]:
    """Returns the shortest pattern that, repeated, gives these names."""
    for period in range(1, len(names) + 1):
        if all(name == names[place % period] for place, name in enumerate(names)):
            break
    return tuple(names[:period])


def write_windows(model: Any) -> dict[str, Any]:
    """Returns the options that `windowed` reads."""
    windows = [layer_of(model, layer).mixer.config.window for layer in range(model.config.stack.depth)]
    kinds = ["full_attention" if window is None else "sliding_attention" for window in windows]
    window = next((window for window in windows if window is not None), None)
    made = {"sliding_window": window}
    return made | {"layer_types": kinds} if len(set(kinds)) > 1 else made


def _write(model: Any, *, biases: str, switch: bool = False) -> dict[str, Any]:
    block = layer_of(model, 0)
    attention, channel = block.mixer, block.channel
    made = write_sizes(model) | write_heads(attention) | write_windows(model)
    made["intermediate_size"] = channel.up.kernel.shape[-1]
    made["hidden_act"] = THEIR_ACTIVATIONS[channel.config.activation or "silu"]
    made["rope_parameters"] = write_rope(attention.config.position)
    if biases in ("all", "attention"):
        made["attention_bias"] = attention.config.bias
    if biases == "all":
        made["mlp_bias"] = channel.config.bias
        if made["sliding_window"] is None:
            del made["sliding_window"]
    if switch:
        made["use_sliding_window"] = made["sliding_window"] is not None
    return made


def _family(
    architecture: str, model_type: str, *, biases: str, qk_norm: bool = False, switch: bool = False
) -> Family:
    return Family(
        architecture,
        model_type,
        read=partial(_read, biases=biases, qk_norm=qk_norm, switch=switch),
        write=partial(_write, biases=biases, switch=switch),
        outer=OUTER,
        layer="model.layers.{}.",
        parts=lambda _: PARTS,
        unread=r"rotary_emb\.inv_freq$",
    )


LLAMA = _family("LlamaForCausalLM", "llama", biases="all")
MISTRAL = _family("MistralForCausalLM", "mistral", biases="none")
QWEN2 = _family("Qwen2ForCausalLM", "qwen2", biases="inputs", switch=True)
QWEN3 = _family("Qwen3ForCausalLM", "qwen3", biases="attention", qk_norm=True, switch=True)
