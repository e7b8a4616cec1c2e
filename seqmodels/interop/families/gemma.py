"""Gemma, Gemma 2 and Gemma 3: scaled embeddings, norms of factor 1 + scale, and from the second on norms of outputs too."""

from functools import partial
from typing import Any

from seqmodels.interop.families.llama import (
    ATTENTION,
    GLU,
    OUTER,
    layer_of,
    read_heads,
    read_sizes,
    windowed,
    write_heads,
    write_sizes,
    write_windows,
)
from seqmodels.interop.family import Family, norm
from seqmodels.interop.options import Options
from seqmodels.interop.rope import read_rope, rope_from, write_rope

PRE_NORMS = (*norm("input_layernorm", "mixer_norm"), *norm("post_attention_layernorm", "channel_norm"))
BOTH_NORMS = (
    *norm("input_layernorm", "mixer_norm"),
    *norm("post_attention_layernorm", "mixer_output_norm"),
    *norm("pre_feedforward_layernorm", "channel_norm"),
    *norm("post_feedforward_layernorm", "channel_output_norm"),
)


def _read(options: Options, *, version: int) -> dict[str, Any]:
    options.only("use_bidirectional_attention", None, False)
    sizes = read_sizes(options, tied=True)
    epsilon = sizes["norm_options"]["epsilon"]
    sizes["norm_options"]["unit_offset"] = True
    sizes["embedding_scale"] = sizes["width"] ** 0.5
    attention = read_heads(options) | {"bias": options.take("attention_bias", False)}
    local, window = {}, None
    if version == 3:
        attention |= {"qk_norm": True, "norm_epsilon": epsilon, "norm_unit_offset": True}
        attention["position"], local["position"] = _positions(options)
    else:
        attention["position"] = read_rope(options)
    if version > 1:
        window = options.take("sliding_window", 4096)
        attention["scale"] = options.take("query_pre_attn_scalar", 256) ** -0.5
        attention["logit_cap"] = options.take("attn_logit_softcapping", None)
        sizes |= {"logit_cap": options.take("final_logit_softcapping", None), "norm_position": "both"}
    every = options.take("sliding_window_pattern", 2 if version == 2 else 6)
    kinds = [
        "sliding_attention" if layer % every < every - 1 else "full_attention"
        for layer in range(sizes["depth"])
    ]
    pattern, mixers = windowed(
        options, attention, window, sizes["depth"], kinds=kinds if version > 1 else None, local=local
    )
    # Some configs of the first version name another activation as hidden_act, which hidden_activation replaces.
    name = "hidden_activation" if version > 1 or options.take("hidden_activation", None) else "hidden_act"
    options.ignore(*(["hidden_act"] if name == "hidden_activation" else []))
    options.only(name, "gelu_pytorch_tanh")
    channel = {"hidden": options.take("intermediate_size"), "activation": "gelu"}
    return sizes | {
        "pattern": pattern,
        "mixers": mixers,
        "channel": "swiglu",
        "channels": {"swiglu": channel},
    }


def _positions(options: Options) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the positions of layers without and with a window."""
    given = options.take("rope_parameters", None)
    if given is not None and "full_attention" in given:
        return rope_from(options, given["full_attention"]), rope_from(options, given["sliding_attention"])
    local = {"rope_theta": options.take("rope_local_base_freq", 10_000.0)}
    return read_rope(options, base=1_000_000.0), rope_from(options, local)


def _write(model: Any, *, version: int) -> dict[str, Any]:
    blocks = [layer_of(model, layer) for layer in range(model.config.stack.depth)]
    attention = blocks[0].mixer
    made = (
        write_sizes(model)
        | write_heads(attention)
        | {
            "attention_bias": attention.config.bias,
            "hidden_act" if version == 1 else "hidden_activation": "gelu_pytorch_tanh",
            "intermediate_size": blocks[0].channel.up.kernel.shape[-1],
            "rope_parameters": write_rope(attention.config.position),
        }
    )
    if version > 1:
        windows = write_windows(model)
        kinds = windows.setdefault("layer_types", [_kind(block) for block in blocks])
        made |= windows | {
            "query_pre_attn_scalar": _integer(attention.config.scale**-2),
            "attn_logit_softcapping": attention.config.logit_cap,
            "final_logit_softcapping": model.config.logit_cap,
        }
    if version == 3:
        ropes = {
            kind: write_rope(block.mixer.config.position) for kind, block in zip(kinds, blocks, strict=True)
        }
        other = next(iter(ropes.values()))
        made["rope_parameters"] = {"full_attention": other, "sliding_attention": other} | ropes
    return made


def _kind(block: Any) -> str:
    return "full_attention" if block.mixer.config.window is None else "sliding_attention"


def _integer(value: float) -> int | float:
    """Returns the integer that rounding made of it, if there is one."""
    return round(value) if abs(value - round(value)) < 1e-9 * value else value


def _family(architecture: str, model_type: str, version: int) -> Family:
    norms = PRE_NORMS if version == 1 else BOTH_NORMS
    return Family(
        architecture,
        model_type,
        read=partial(_read, version=version),
        write=partial(_write, version=version),
        outer=OUTER,
        layer="model.layers.{}.",
        parts=lambda _: {"": norms, "attention": ATTENTION, "swiglu": GLU},
        unread=r"rotary_emb\.inv_freq$",
    )


GEMMA = _family("GemmaForCausalLM", "gemma", 1)
GEMMA2 = _family("Gemma2ForCausalLM", "gemma2", 2)
GEMMA3 = _family("Gemma3ForCausalLM", "gemma3_text", 3)
