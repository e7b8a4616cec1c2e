"""Mixers that begin with the weights of an attention, whose place they take in a trained model."""

from collections.abc import Mapping

import jax.numpy as jnp

from layers.mixers.state_space.mamba2 import Mamba2Config
from layers.parts.attention_config import AttentionConfig
from layers.typing import Array


def fits(attention: AttentionConfig, config: Mamba2Config) -> bool:
    """Returns whether a Mamba-2 has the heads of an attention, each with B and C of its own, of the same size."""
    sizes = (config.heads, config.groups, config.head_dim, config.state_size)
    plain = not (attention.bias or attention.output_bias or config.bias or config.scales != (1.0,) * 5)
    return (
        plain
        and attention.output_projection
        and sizes == (attention.heads, attention.heads, attention.size, attention.size)
    )


def mamba2_options(attention: AttentionConfig) -> dict[str, int]:
    """Returns the options with which a Mamba-2 fits an attention."""
    heads, size = attention.heads, attention.size
    return dict(inner=heads * size, head_dim=size, state_size=size, groups=heads)


def mamba2_from_attention(
    attention: AttentionConfig, given: Mapping[str, Array], config: Mamba2Config, drawn: Mapping[str, Array]
) -> dict[str, Array]:
    """Returns the parameters of a Mamba-2 that begin as those of an attention (Wang et al. 2024, arXiv:2408.15237).

        u = W_v x,   B = W_k x,   C = W_q x,   W_out = W_o

    so that but for the short convolution, the decay, the gate and the norm, whose parameters stay as drawn, it is linear attention
    with the same queries, keys and values. Heads that share keys and values get copies of them. Positions are left out.

    Args:
      attention, config: configs of the two, which fit (`fits`).
      given: parameters of the attention by their names in it, "query/kernel" (d, h p), "key/kernel", "value/kernel" and
        "output/kernel".
      drawn: the parameter "input/kernel" of the Mamba-2 as drawn.
    """
    channels, states = config.channels, config.groups * config.state_size
    shares = attention.heads // attention.groups

    def of_all_heads(kernel: Array) -> Array:
        by_head = kernel.reshape(len(kernel), attention.groups, attention.size)
        return jnp.repeat(by_head, shares, axis=1).reshape(len(kernel), -1)

    kernel = jnp.asarray(drawn["input/kernel"])
    # The columns of one matrix: z, u, B, C and dt.
    z, _, dt = jnp.split(kernel, [channels, 2 * channels + 2 * states], axis=1)
    maps = [of_all_heads(given["value/kernel"]), of_all_heads(given["key/kernel"]), given["query/kernel"]]
    joined = jnp.concatenate([z, *maps, dt], axis=1)
    return {
        "input/kernel": joined.astype(kernel.dtype),
        "output/kernel": given["output/kernel"],
    }
