"""Pointer networks: at each step of a target, logits over the items of its source (Vinyals et al. 2015, arXiv:1506.03134)."""

import jax
import jax.numpy as jnp
from flax import nnx

from layers.indices import check_indices, nan_outside
from layers.parameters import NO_DECAY, linear, parameter
from layers.segments import SegmentIds, Segments
from layers.typing import Array, Bool, Float, Int, Key, Num
from seqmodels.backbone import final_norm, normalized
from seqmodels.causality import check_causal
from seqmodels.config import PointerNetworkConfig
from seqmodels.embedding import Embedding
from seqmodels.encoder import pool
from seqmodels.stack import Stack


class Pointing(nnx.Module):
    """Scores of items e (b, s, d) for queries d (b, t, d).

    u_ij = v . tanh(W_1 e_j + W_2 d_i)
    """

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.items = linear(width, width, axes=("embed", "inner"), bias=False, rngs=rngs)
        self.queries = linear(width, width, axes=("embed", "inner"), bias=False, rngs=rngs)
        self.scores = parameter(rngs, nnx.initializers.normal(width**-0.5), (width,), axes=("inner",))

    def __call__(self, items: Float[Array, "b s d"], queries: Float[Array, "b t d"]) -> Float[Array, "b t s"]:
        both = self.items(items)[:, None] + self.queries(queries)[:, :, None]
        return jnp.einsum("btsd,d->bts", jnp.tanh(both), self.scores[...])


class Processing(nnx.Module):
    """Steps of an LSTM without inputs that reads a set by attention (Vinyals et al. 2016, arXiv:1511.06391).

        q_n = LSTM(q*_{n-1});   a_j = softmax_j(m_j . q_n);   q*_n = [q_n; sum_j a_j m_j],   q*_0 = 0

    for items m (b, s, d); the output q of the LSTM is d wide, and its recurrent input q*, 2d.
    """

    def __init__(self, width: int, steps: int, *, rngs: nnx.Rngs):
        self.width, self.steps = width, steps
        self.gates = linear(2 * width, 4 * width, axes=("embed", "inner"), rngs=rngs)

    def __call__(self, items: Float[Array, "b s d"], real: Bool[Array, "b s"]) -> Float[Array, "b e"]:
        """Returns q* after the last step, 2d wide."""
        q, cells = (jnp.zeros((len(items), n * self.width), jnp.float32) for n in (2, 1))
        for _ in range(self.steps):
            i, f, g, o = jnp.split(self.gates(q), 4, axis=-1)
            cells = jax.nn.sigmoid(f) * cells + jax.nn.sigmoid(i) * jnp.tanh(g)
            asked = jax.nn.sigmoid(o) * jnp.tanh(cells)
            weights = _softmax(jnp.einsum("bsd,bd->bs", items, asked), real)
            q = jnp.concatenate([asked, jnp.einsum("bs,bsd->bd", weights, items)], axis=-1)
        return q


class PointerNetwork(nnx.Module):
    """Logits of the item of a source that comes next, at each step of a target (Vinyals et al. 2015, arXiv:1506.03134).

        x = embed(source);   e = norm(encoder(x)), or without an encoder e = x + W_b relu(W_a x), item by item
        d = norm(decoder([start + W_s r; x at the items that the target names]))
        logits_ij = v . tanh(W_1 e_j + W_2 d_i),   j over the items, and e_0, learned, for the end

    with r the last q* of `Processing` or, without it, the mean of e. In the papers r is the state of an LSTM; here it is an input, so
    that the decoder has any causal mixers. With a glimpse, d_i is d_i + sum_j softmax_j(u_ij) e_j before it points, u a `Pointing` of its
    own. Without an encoder, with attention as a reading of sets, outputs do not depend on the order of the source, which is
    read-process-write (Vinyals et al. 2016, arXiv:1511.06391).

    Items are counted from 1 and 0 is the end, so that targets of sources of any length have the same numbers.

    Raises:
      ValueError: a mixer of the decoder is not causal.
    """

    def __init__(self, config: PointerNetworkConfig, *, rngs: nnx.Rngs):
        self.config = config
        stack, width = config.stack, config.stack.width
        self.embedding = Embedding(config.input, width, jnp.dtype(stack.dtype), rngs=rngs)
        self.encoder = None if config.encoder is None else Stack(config.encoder, rngs=rngs)
        self.stack = Stack(stack, rngs=rngs)
        check_causal(self.stack, "the decoder of a pointer network")
        self.norm = final_norm(stack, rngs)
        self.encoder_norm = None if config.encoder is None else final_norm(config.encoder, rngs)
        if self.encoder is None:
            self.up = linear(width, width, axes=("embed", "mlp"), rngs=rngs)
            self.down = linear(width, width, axes=("mlp", "embed"), rngs=rngs)
        steps = config.process_steps
        self.processing = Processing(width, steps, rngs=rngs) if steps else None
        self.enter = linear(2 * width if steps else width, width, axes=("embed", None), rngs=rngs)
        small = {"axes": ("embed",), **NO_DECAY}
        self.end = parameter(rngs, nnx.initializers.normal(width**-0.5), (width,), **small)
        self.glimpse = Pointing(width, rngs=rngs) if config.glimpse else None
        self.pointing = Pointing(width, rngs=rngs)

    def read(
        self,
        source: Num[Array, "b s *c"],
        segment_ids: Int[Array, "b s"] | Segments | None = None,
        *,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "b s+1 d"], Float[Array, "b s+1 d"], Bool[Array, "b s+1"]]:
        """Returns what the decoder gets at the start and for each item, what it points at, the end first, and which of these exist."""
        segments = Segments.of(segment_ids)
        real = jnp.ones(source.shape[:2], bool) if segments is None else segments.real
        x, _ = self.embedding(source, segment_ids=segments)
        if self.encoder is None:
            x = jnp.where(real[..., None], x, 0)
            items = x + self.down(jax.nn.relu(self.up(x)))
        else:
            items, _ = self.encoder(x, segment_ids=segments, key=key)
            items = normalized(self.encoder_norm, items, segments, key)
        x, items = (jnp.where(real[..., None], y, 0).astype(jnp.float32) for y in (x, items))
        read = pool(items, real, "mean") if self.processing is None else self.processing(items, real)
        end = jnp.broadcast_to(self.end[...], (len(x), 1, x.shape[2]))
        real = jnp.pad(real, ((0, 0), (1, 0)), constant_values=True)
        inputs = jnp.concatenate([self.enter(read)[:, None], x], axis=1)
        return inputs, jnp.concatenate([end, items], axis=1), real

    def point(
        self,
        d: Float[Array, "b t d"],
        items: Float[Array, "b s d"],
        real: Bool[Array, "b s"],
        segments: Segments | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "b t s"]:
        """Returns the logits of outputs of the decoder, whose segments these are; -inf where there is no item."""
        d = normalized(self.norm, d, segments, key).astype(jnp.float32)
        seen = real[:, None]
        if self.glimpse is not None:
            d = d + _softmax(self.glimpse(items, d), seen) @ items
        return jnp.where(seen, self.pointing(items, d), -jnp.inf)

    def __call__(
        self,
        source: Num[Array, "b s *c"],
        target: Int[Array, "b t"],
        *,
        source_segment_ids: Int[Array, "b s"] | Segments | None = None,
        segment_ids: SegmentIds = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "b t s+1"], None]:
        """Returns the logits of what follows each step of a target.

        Args:
          source: token ids (b, s) or vectors (b, s, c); a row is one source.
          target: 0 for the start, and then the items, from 1 on.
          source_segment_ids, segment_ids: 0 marks padding of source and target.
          key: random key of the dropout; passed in training only.

        Returns:
          float32 logits of the end, 0, and of the items 1 to s, -inf at padding; and None.

        Raises:
          ValueError: source and target have different numbers of rows, or a target that is not traced names no item.
        """
        if source.shape[0] != target.shape[0]:
            raise ValueError(
                f"source has {source.shape[0]} rows, and target has {target.shape[0]}; expected one source per target"
            )
        segments = Segments.of(segment_ids)
        if segments is not None:
            target = jnp.where(segments.real, target, 0)
        count = source.shape[1] + 1
        check_indices("target", target, count, of="the items and the end")
        keys = (None, None) if key is None else jax.random.split(key)
        inputs, items, real = self.read(source, source_segment_ids, key=keys[0])
        x = jnp.take_along_axis(inputs, jnp.clip(target, 0, count - 1)[..., None], axis=1)
        x = nan_outside(x, target[..., None], count, counted=True).astype(self.config.stack.dtype)
        d, _ = self.stack(x, segment_ids=segments, key=keys[1])
        return self.point(d, items, real, segments, key), None

    def points(
        self,
        source: Num[Array, "b s *c"],
        steps: int,
        *,
        segment_ids: Int[Array, "b s"] | Segments | None = None,
        distinct: bool = False,
    ) -> Int[Array, "b n"]:
        """Returns the likeliest item at each of so many steps, each given those before it; 0 from the end on.

        Args:
          source: token ids (b, s) or vectors (b, s, c).
          steps: n, the most items of a target.
          segment_ids: 0 marks padding.
          distinct: whether no item is named twice.
        """
        inputs, items, real = self.read(source, segment_ids)
        rows = jnp.arange(len(items), dtype=jnp.int32)

        def step(carried, _):
            state, last, free, ended = carried
            x = jnp.take_along_axis(inputs, last[:, None, None], axis=1).astype(self.config.stack.dtype)
            d, state = self.stack(x, state)
            logits = jnp.where(free, self.point(d, items, real)[:, 0], -jnp.inf)
            new = jnp.where(ended, 0, jnp.argmax(logits, axis=-1).astype(jnp.int32))
            if distinct:
                free = free.at[rows, new].set(new == 0)
            return (state, new, free, ended | (new == 0)), new

        start = jnp.zeros_like(rows)
        state = self.stack.init_state(len(items), max_length=steps)
        _, found = jax.lax.scan(step, (state, start, real, start > 0), length=steps)
        return found.T


def _softmax(logits: Float[Array, "*b s"], seen: Bool[Array, "*#b s"]) -> Float[Array, "*b s"]:
    """Weights over what is seen, all 0 where that is nothing."""
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True, where=seen, initial=-jnp.inf))
    weights = jnp.where(seen, jnp.exp(jnp.where(seen, logits - jnp.where(top == -jnp.inf, 0, top), 0)), 0)
    total = weights.sum(-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1)
