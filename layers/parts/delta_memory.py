"""The memory that DeltaNet and its gated descendants share: short convolutions, writing strengths and the delta rule."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from layers.kernels.delta_rule import delta_rule
from layers.kernels.segments import SegmentIds
from layers.parameters import linear
from layers.parts.carry import continues, enter, next_segment
from layers.parts.heads import split_heads
from layers.parts.short_convolution import ShortConvolution
from layers.typing import Array, Float, Int


class DeltaState(NamedTuple):
    """The matrix memory of every head, float32, the last inputs of the convolution, and their segment."""

    memory: Float[Array, "b h k v"]
    inputs: Float[Array, "b w-1 n"]
    segment: Int[Array, "b"]


class DeltaMemory(nnx.Module):
    """A delta rule with its inputs.

        q, k, v = silu(conv(W_q x)), silu(conv(W_k x)), silu(conv(W_v x)),   then q and k of norm 1
        beta = sigmoid(W_b x)                                                (value_heads)
        S' = Diag(alpha_t) S_{t-1},   S_t = S' + beta_t k_t (v_t - S'^T k_t)^T,  o_t = S_t^T q_t / sqrt(key_dim)

    q, k and v come from one projection and one convolution, in this order. Beta is doubled with
    `negative_eigenvalues`.
    """

    def __init__(
        self,
        width: int,
        *,
        key_heads: int,
        value_heads: int,
        key_dim: int,
        value_dim: int,
        taps: int,
        negative_eigenvalues: bool,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.key_heads, self.key_dim = key_heads, key_dim
        self.value_heads, self.value_dim = value_heads, value_dim
        self.largest = 2.0 if negative_eigenvalues else 1.0
        features = 2 * key_heads * key_dim + value_heads * value_dim
        self.projection = linear(width, features, bias=False, dtype=dtype, rngs=rngs)
        self.convolution = ShortConvolution(features, taps, dtype=dtype, rngs=rngs)
        self.strength = linear(width, value_heads, bias=False, dtype=dtype, rngs=rngs)

    def init_state(self, batch_size: int) -> DeltaState:
        """An empty memory, and no inputs yet."""
        shape = (batch_size, self.value_heads, self.key_dim, self.value_dim)
        return DeltaState(
            jnp.zeros(shape, jnp.float32),
            self.convolution.init_state(batch_size),
            jnp.zeros(batch_size, jnp.int32),
        )

    def __call__(
        self,
        x: Float[Array, "b t d"],
        state: DeltaState | None,
        *,
        log_decay: Float[Array, "b t h"] | Float[Array, "b t h k"] | None = None,
        segment_ids: SegmentIds,
    ) -> tuple[Float[Array, "b t h v"], DeltaState | None]:
        """What the queries read, and the state after the last token if one was given."""
        memory = inputs = None
        if state is not None:
            keep = continues(state.segment, segment_ids)
            memory, inputs = enter(state.memory, keep), enter(state.inputs, keep)
        features, inputs = self.convolution(self.projection(x), inputs, segment_ids=segment_ids)
        keys = self.key_heads * self.key_dim
        q, k, v = jnp.split(features, [keys, 2 * keys], axis=-1)
        o, memory = delta_rule(
            split_heads(q, self.key_heads),
            split_heads(k, self.key_heads),
            split_heads(v, self.value_heads),
            self.largest * jax.nn.sigmoid(self.strength(x).astype(jnp.float32)),
            log_decay=log_decay,
            normalize_qk=True,
            initial_state=memory,
            segment_ids=segment_ids,
        )
        if state is None:
            return o, None
        return o, DeltaState(memory, inputs, next_segment(state.segment, segment_ids, x.shape[1]))
