"""Hierarchical memory: a recurrent memory that recalls those of earlier segments (HMT, He et al. 2024, arXiv:2405.06067)."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from layers.parameters import NO_DECAY, linear, parameter
from layers.typing import Array, Bool, Float, Int, Key
from seqmodels.config import HierarchicalMemoryConfig
from seqmodels.recurrent_memory import RecurrentMemory


class HierarchicalState(NamedTuple):
    """What a hierarchical memory carries between segments.

    Attributes:
      memories: those of the last segments, the newest one last, float32; rows with fewer segments have zeros in front.
      count: how many segments of each row there were.
      tokens: the last embedded tokens of the segment before.
      real: which of them are no padding, and are there.
    """

    memories: Float[Array, "b n d"]
    count: Int[Array, "b"]
    tokens: Float[Array, "b k d"]
    real: Bool[Array, "b k"]


class HierarchicalMemory(RecurrentMemory):
    """A language model of segments that recall by what they begin with (HMT, He et al. 2024, arXiv:2405.06067).

        [_; _; q_n] = norm(stack([s; first half of x_n; s]))
        r_n = sum_i a_i M_i,   a = softmax_i(W_q q_n . W_k M_i / sqrt(h)),   over the last `recall` segments i < n;   r_1 learned
        [_; _; h_n; M_n] = norm(stack([r_n; last k tokens of x_{n-1}; x_n; r_n])),   logits_n = W h_n

    x_n are the embedded tokens of segment n, s is a learned vector, and every memory is one. This is the authors' code with the scale
    1 / sqrt(h) everywhere; for large models they train with 1 / h. Tokens of the segment before keep the absolute position that was added
    to them, if any. With `unroll=k` no gradient passes from segments k, 2 k, ... on to memories before them.

    Raises:
      ValueError: as for `RecurrentMemory`.
    """

    def __init__(self, config: HierarchicalMemoryConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        width = config.stack.width
        hidden = config.recall_width or width
        small = nnx.initializers.normal(width**-0.5)
        self.summary = parameter(rngs, small, (1, width), axes=(None, "embed"), **NO_DECAY)
        options = {"axes": ("embed", None), "bias": False, "rngs": rngs}
        self.query, self.key = (linear(width, hidden, **options) for _ in range(2))

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> HierarchicalState:
        """Returns what is carried before the first segment; `max_length` is not needed, as it does not grow."""
        config = self.config
        width, tokens = config.stack.width, (batch_size, config.sensory)
        return HierarchicalState(
            jnp.zeros((batch_size, config.recall, width), jnp.float32),
            jnp.zeros(batch_size, jnp.int32),
            jnp.zeros((*tokens, width), jnp.dtype(config.stack.dtype)),
            jnp.zeros(tokens, bool),
        )

    def _read(
        self,
        carried: HierarchicalState,
        x: Float[Array, "b t d"],
        real: Bool[Array, "b t"] | None,
        key: Key[Array, ""] | None,
    ) -> tuple[HierarchicalState, Float[Array, "b t d"]]:
        """Returns the state after a segment, and its features."""
        config, (memories, count, tokens, there) = self.config, carried
        memories = self._cut(memories, count)
        keys = (None, None) if key is None else jax.random.split(key)
        half = config.half
        s = jnp.broadcast_to(self.summary[...][None], (len(x), *self.summary.shape))
        _, q = self._between(s, x[:, :half], None if real is None else real[:, :half], keys[0])
        joined, seen = x, real
        own = jnp.ones(x.shape[:2], bool) if real is None else real
        if config.sensory:
            joined, seen = (jnp.concatenate(pair, axis=1) for pair in ((tokens, x), (there, own)))
        h, written = self._between(self._recalled(q, memories, count), joined, seen, keys[1])
        last = -config.sensory or x.shape[1]
        new = (
            jnp.concatenate([memories[:, 1:], written], axis=1),
            count + 1,
            x[:, last:].astype(tokens.dtype),
            own[:, last:],
        )
        h = h[:, config.sensory :]
        if real is None:
            return HierarchicalState(*new), h
        some = real.any(1)

        def chosen(new, old):
            return jnp.where(some.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        return HierarchicalState(*map(chosen, new, (memories, *carried[1:]))), h

    def _recalled(
        self, q: Float[Array, "b 1 d"], memories: Float[Array, "b n d"], count: Int[Array, "b"]
    ) -> Float[Array, "b 1 d"]:
        """Returns the mean of the memories by the weights of their products with q; what is learned for rows without any."""
        asked, keys = self.query(q), self.key(memories)
        logits = jnp.einsum("bqk,bnk->bqn", asked, keys) / math.sqrt(keys.shape[-1])
        slots = memories.shape[1]
        there = (jnp.arange(slots)[None] >= slots - count[:, None])[:, None]
        none = ~there.any(2, keepdims=True)
        weights = jax.nn.softmax(jnp.where(there | none, logits, -jnp.inf), axis=-1)
        return jnp.where(none, self.memory[...][None], jnp.einsum("bqn,bnd->bqd", weights, memories))
