"""Softmax attention with grouped heads, rotary positions, windows and a key-value cache."""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from flax import nnx

from layers.kernels.attention import attention
from layers.kernels.attention.options import segment_positions
from layers.kernels.segments import segment_numbers
from layers.mixers.carry import check_inputs, continues, next_segment, refuse_state
from layers.norms import NormConfig, RMSNorm
from layers.parameters import linear
from layers.positions import rotary
from layers.typing import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Options of `Attention`.

    Attributes:
      width: d, features in and out.
      heads: h, query heads.
      kv_heads: g, key/value heads; divides h; h if None. 1 is multi-query attention.
      head_dim: features of a head; width / h if None.
      causal: a token sees only itself and what came before.
      window: causal: the last `window` tokens, its own included; otherwise tokens at a distance up to `window`.
      position: "rope" or "none".
      rope_base: see `layers.positions.rotary`.
      qk_norm: RMSNorm over the features of every query and key head, before the rotation.
      bias: add biases in the projections.
      dtype: type of activations and of the cache.
    """

    width: int
    heads: int = 8
    kv_heads: int | None = None
    head_dim: int | None = None
    causal: bool = True
    window: int | None = None
    position: Literal["rope", "none"] = "rope"
    rope_base: float = 10_000.0
    qk_norm: bool = False
    bias: bool = False
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if self.heads < 1:
            raise ValueError(f"heads={self.heads}; expected at least 1")
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(
                f"heads={self.heads} does not divide width={self.width}; "
                "choose heads that do, or set head_dim to give heads a size of their own"
            )
        if self.kv_heads is not None and (self.kv_heads < 1 or self.heads % self.kv_heads):
            raise ValueError(f"kv_heads={self.kv_heads} does not divide heads={self.heads}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window}; expected at least 1, or None")
        if self.position not in ("rope", "none"):
            raise ValueError(f"position={self.position!r}; expected 'rope' or 'none'")
        if self.position == "rope" and self.size % 2:
            raise ValueError(
                f"head_dim={self.size} is odd; rotary positions need an even one, or position='none'"
            )

    @property
    def size(self) -> int:
        """Features of a head."""
        return self.head_dim or self.width // self.heads

    @property
    def groups(self) -> int:
        """Key/value heads."""
        return self.kv_heads or self.heads


class AttentionState(NamedTuple):
    """A key-value cache of `s` slots, filled per row; with a window the slots are used in turn.

    Attributes:
      k, v: rotated keys, and values.
      numbers: which segment of its row, counted from 1, a slot belongs to; 0 is empty.
      positions: position of a slot's token within its segment.
      length: real tokens seen by each row.
      segment: id of the last real token of each row, 0 before there is one.
      number: segments begun in each row.
      position: real tokens of the current segment so far.
    """

    k: Float[Array, "b s g k"]
    v: Float[Array, "b s g k"]
    numbers: Int[Array, "b s"]
    positions: Int[Array, "b s"]
    length: Int[Array, "b"]
    segment: Int[Array, "b"]
    number: Int[Array, "b"]
    position: Int[Array, "b"]


class Attention(nnx.Module):
    """Multi-head attention (Vaswani et al. 2017, arXiv:1706.03762) with grouped heads (Ainslie et al. 2023, 2305.13245).

        q, k, v = W_q x, W_k x, W_v x;  y = W_o softmax(q k^T / sqrt(head_dim)) v

    Query head i reads key/value head i // (h / g). Positions restart in every segment.
    """

    def __init__(self, config: AttentionConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.causal = config.causal
        options = {"bias": config.bias, "dtype": config.dtype, "rngs": rngs}
        self.query = linear(config.width, config.heads * config.size, **options)
        self.key = linear(config.width, config.groups * config.size, **options)
        self.value = linear(config.width, config.groups * config.size, **options)
        self.output = linear(config.heads * config.size, config.width, **options)
        norm = NormConfig(config.size, dtype=config.dtype)
        self.query_norm = RMSNorm(norm, rngs=rngs) if config.qk_norm else None
        self.key_norm = RMSNorm(norm, rngs=rngs) if config.qk_norm else None

    def init_state(self, batch_size: int, *, max_length: int | None = None) -> AttentionState:
        """An empty cache.

        Args:
          batch_size: rows.
          max_length: the most real tokens that a row will hold; outputs of tokens beyond are NaN. With a window the
            cache has that many slots whatever the length.
        """
        config = self.config
        if not self.causal:
            raise ValueError("attention with causal=False has no state; it needs the whole sequence at once")
        if max_length is None and config.window is None:
            raise ValueError(
                "attention without a window needs max_length, the most tokens that its cache will hold"
            )
        slots = max_length if config.window is None else config.window
        cache = jnp.zeros((batch_size, slots, config.groups, config.size), config.dtype)
        empty, zero = jnp.zeros((batch_size, slots), jnp.int32), jnp.zeros(batch_size, jnp.int32)
        return AttentionState(cache, cache, empty, empty, zero, zero, zero, zero)

    def __call__(
        self,
        x: Float[Array, "b t d"],
        state: AttentionState | None = None,
        *,
        segment_ids: Int[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t d"], AttentionState | None]:
        """Mixes along time; see the contract of mixers in CONTRIBUTING.md."""
        config = self.config
        check_inputs("attention", x, config.width, segment_ids)
        if not self.causal:
            refuse_state("attention with causal=False", state)
        b, t = x.shape[:2]
        q = self.query(x).reshape(b, t, config.heads, config.size)
        k = self.key(x).reshape(b, t, config.groups, config.size)
        v = self.value(x).reshape(b, t, config.groups, config.size)
        if config.qk_norm:
            q, k = self.query_norm(q), self.key_norm(k)
        if state is None:
            positions = jnp.arange(t)[None] if segment_ids is None else segment_positions(segment_ids)
            q, k = self._rotate(q, positions), self._rotate(k, positions)
            o = attention(q, k, v, causal=config.causal, window=config.window, segment_ids=segment_ids)
        else:
            numbers, positions = _places(state, segment_ids, (b, t))
            q, k = self._rotate(q, positions), self._rotate(k, positions)
            o, state = self._cached(q, k, v, numbers, positions, state)
            state = state._replace(segment=next_segment(state.segment, segment_ids, t))
        return self.output(o.reshape(b, t, config.heads * config.size)), state

    def _rotate(self, x, positions):
        return rotary(x, positions, self.config.rope_base) if self.config.position == "rope" else x

    def _cached(self, q, k, v, numbers, positions, state):
        """Attention over the cache and the new tokens, and the cache with them in it."""
        window, slots = self.config.window, state.k.shape[1]
        new = (k, v, numbers, positions)
        index = _slots(state.length, numbers, slots, window is not None)
        updated = seen = _write(state, new, index)
        if window is not None:
            # A ring overwrites what early queries of a long call still need: they read what was there and what is new.
            seen = tuple(jnp.concatenate(pair, axis=1) for pair in zip(state[:4], new, strict=True))
        o = attention(
            q,
            seen[0],
            seen[1],
            causal=True,
            window=window,
            segment_ids=numbers,
            kv_segment_ids=seen[2],
            q_positions=positions,
            kv_positions=seen[3],
        )
        real = numbers != 0
        if window is None:
            o = jnp.where((real & (index >= slots))[..., None, None], jnp.nan, o)
        last = jnp.where(real, jnp.arange(real.shape[1])[None], -1).max(1, initial=-1)

        def at_last(values, before):
            picked = jnp.take_along_axis(values, jnp.maximum(last, 0)[:, None], axis=1)[:, 0]
            return jnp.where(last >= 0, picked, before)

        return o, AttentionState(
            *updated,
            length=state.length + real.sum(1, dtype=jnp.int32),
            segment=state.segment,
            number=at_last(numbers, state.number),
            position=at_last(positions + 1, state.position),
        )


def _places(state, segment_ids, shape):
    """Number of the segment, counted over all calls, and position in it of every new token."""
    ids = jnp.ones(shape, jnp.int32) if segment_ids is None else segment_ids
    going_on = continues(state.segment, segment_ids) & (state.number > 0)
    here = segment_numbers(ids)
    numbers = jnp.where(here == 0, 0, here + (state.number - going_on)[:, None])
    first = going_on[:, None] & (here == 1)
    return numbers, segment_positions(ids) + jnp.where(first, state.position[:, None], 0)


def _slots(length, numbers, slots, ring):
    """The slot of every new token; one that is not written (padding, or soon overwritten) gets a slot out of range."""
    real = numbers != 0
    index = length[:, None] + jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1
    if not ring:
        return jnp.where(real, index, slots)
    stays = index >= (length + real.sum(1))[:, None] - slots
    return jnp.where(real & stays, index % slots, slots)


def _write(state, new, index):
    """The first four fields of the cache with the new tokens in their slots."""
    rows = jnp.arange(index.shape[0])[:, None]
    return tuple(old.at[rows, index].set(x, mode="drop") for old, x in zip(state[:4], new, strict=True))
