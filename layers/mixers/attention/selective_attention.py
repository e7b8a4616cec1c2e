"""Selective attention: sharpness depends on the query and its position (Zhang et al. 2024, arXiv:2411.12892)."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from layers.mixer import SELF
from layers.mixers.attention.attention import Attention
from layers.options import checked_dataclass
from layers.parameters import NO_DECAY, parameter
from layers.parts.attention_config import AttentionConfig
from layers.segments import Segments
from layers.typing import Array, Float, Int

# The first coefficient of log n, as in the authors' code for training from scratch.
START = math.exp(-math.exp(1.5))


@checked_dataclass
class SelectiveAttentionConfig(AttentionConfig):
    """Options of `SelectiveAttention`: those of `AttentionConfig`, and three more.

    Attributes:
      token_temperature: whether the queries' temperature has a part that depends on the token.
      position_temperature: whether it has a part that depends on the number of keys that a query sees.
      value_temperature: whether values are scaled per token.
    """

    token_temperature: bool = True
    position_temperature: bool = True
    value_temperature: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.token_temperature or self.position_temperature or self.value_temperature):
            raise ValueError("all temperatures are off, which is the mixer 'attention'; leave one on")
        if self.sink_tokens and not self.causal and self.position_temperature:
            raise ValueError(
                "sink_tokens with causal=False has no position_temperature; turn one of them off"
            )


class SelectiveAttention(Attention):
    """Selective attention: softmax with temperatures by token and position (Zhang et al. 2024, arXiv:2411.12892).

        o_i = sum_j softmax_j(tau_i q_i . k_j / sqrt(head_dim)) tau'_j v_j
        tau_i  = 1 + tanh(w_q . gelu(q_i)) + sigmoid(alpha) log n_i
        tau'_j = 1 + tanh(w_v . gelu(v_j))

    with one w per head (per key/value head) on the projected query or value, one alpha for all heads, and n_i the number
    of keys that the query sees in its segment, its own included. The queries are taken before the rotation. The w start
    at zero, so that the tokens' parts start at 1.

    The position part follows the paper. The authors' code has only that part, with exp(-exp(beta)) in place of
    sigmoid(alpha) and an initial beta of 1.5; alpha starts at the same coefficient, 0.0113. The paper also states that
    the token parts are tanh(f), are added to the position part, and share the weights of attention. That f applies w to
    gelu of the projected query or value, and the 1 + of the values, are our reading.
    """

    patterns = SELF

    def __init__(self, config: SelectiveAttentionConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        zeros = nnx.initializers.zeros_init()

        def by_head(wanted, heads):
            return parameter(rngs, zeros, (heads, config.size), axes=("heads", None)) if wanted else None

        self.query_weight = by_head(config.token_temperature, config.heads)
        self.value_weight = by_head(config.value_temperature, config.groups)
        start = nnx.initializers.constant(math.log(START / (1 - START)))
        self.alpha = parameter(rngs, start, (), **NO_DECAY) if config.position_temperature else None

    def project(
        self,
        x: Float[Array, "b t d"],
        positions: Int[Array, "#b t"],
        segments: Segments | None,
        turned: Float[Array, "#b #t _"] | None = None,
    ) -> tuple[Float[Array, "b t h k"], Float[Array, "b t g k"], Float[Array, "b t g k"]]:
        """Returns rotated queries and keys, and values; queries and values are scaled by their temperatures."""
        q, k, v = self.heads(x)
        tau = 1.0 + _by_token(self.query_weight, q)
        if self.alpha is not None:
            seen = jnp.log(self._seen(positions, segments).astype(jnp.float32))
            tau = tau + (jax.nn.sigmoid(self.alpha[...]) * seen)[..., None, None]
        tau_v = 1.0 + _by_token(self.value_weight, v)
        q, v = (q * tau).astype(q.dtype), (v * tau_v).astype(v.dtype)
        q, k = (self.position.rotate(y, positions, turned) for y in (q, k))
        return q, k, v

    def _seen(self, positions, segments):
        """Returns the number of keys that each query sees: at least 1 for real tokens and 1 for padding."""
        config, time = self.config, positions.shape[1]
        if config.causal:
            most = None if config.window is None else config.window + config.sink_tokens
            return jnp.clip(positions + 1, 1, most)
        if segments is None:
            length = jnp.full((1, time), time)
        else:
            numbers = segments.numbers
            rows = jnp.arange(numbers.shape[0])[:, None]
            length = (
                jnp.zeros((numbers.shape[0], time + 1), jnp.int32).at[rows, numbers].add(1)[rows, numbers]
            )
        if config.window is None:
            return length
        left, right = positions, length - 1 - positions
        seen = 1 + jnp.minimum(left, config.window) + jnp.minimum(right, config.window)
        return jnp.maximum(seen, 1)


def _by_token(weight, y):
    """Returns tanh(w . gelu(y)) per head, (b, t, h, 1) float32, or 0."""
    if weight is None:
        return 0.0
    score = jnp.einsum("bthk,hk->bth", jax.nn.gelu(y.astype(jnp.float32)), weight[...])
    return jnp.tanh(score)[..., None]
