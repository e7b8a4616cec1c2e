"""Attention: softmax attention with grouped heads, windows, sinks and a cache (Vaswani et al. 2017, arXiv:1706.03762)."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from layers.caches.state import CacheState, View
from layers.kernels.attention import Logits, Mask, Tokens
from layers.mixer import Visit
from layers.norms import NormConfig, RMSNorm
from layers.parameters import NO_DECAY, linear, parameter
from layers.parts.attention_config import AttentionConfig
from layers.parts.cache import Cache, empty_cache, extend
from layers.parts.cross_attention import CrossAttention
from layers.parts.heads import join_heads, split_heads
from layers.parts.relative_attention import relative_attention
from layers.parts.streaming_attention import streaming_attention
from layers.positions import Clex, Position
from layers.segments import Segments
from layers.typing import Array, Float, Int


class Attention(CrossAttention):
    """Attention: softmax attention with grouped heads and a choice of positions (Vaswani et al. 2017, arXiv:1706.03762).

        q, k, v = W_q x, W_k x, W_v x;  y = W_o softmax(q k^T / sqrt(head_dim)) v

    Query head i reads key/value head i // (h / g) (Ainslie et al. 2023, arXiv:2305.13245). Positions restart in every
    segment. The cache holds rotated keys, and values. It has `max_length` slots, and outputs of later tokens are NaN.
    With a window it has one slot per token of the window and per sink, for any length. With CLEX a cache has the frequencies of rows of
    `max_length` tokens, and whole segments have those of their own length.
    """

    keeps_segments = True

    def __init__(self, config: AttentionConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.causal = config.causal
        options = {"axes": ("embed", "heads"), "bias": config.bias, "dtype": config.dtype, "rngs": rngs}
        self.query = linear(config.width, config.heads * config.size, **options)
        self.key = linear(config.width, config.groups * config.size, **options)
        self.value = linear(config.width, config.groups * config.size, **options)
        options |= {"axes": ("heads", "embed")}
        if config.output_bias is not None:
            options["bias"] = config.output_bias
        self.output = (
            linear(config.heads * config.size, config.width, **options)
            if config.output_projection
            else jax.nn.identity
        )
        self.query_norm = self._norm(config.heads, rngs) if config.qk_norm else None
        self.key_norm = self._norm(config.groups, rngs) if config.qk_norm else None
        self.position = Position(
            config.position,
            **dict(width=config.width, heads=config.heads, size=config.size, causal=config.causal, rngs=rngs),
        )
        self.reads_lengths = isinstance(config.position, Clex)
        small = nnx.initializers.normal(0.02)
        heads = {"axes": ("heads",), **NO_DECAY}
        self.sinks = parameter(rngs, small, (config.heads,), **heads) if config.sink_logits else None

    def _norm(self, heads: int, rngs: nnx.Rngs) -> RMSNorm:
        """Returns the norm of queries or keys."""
        config = self.config
        size = config.size * (heads if config.norm_heads == "all" else 1)
        return RMSNorm(
            NormConfig(size, config.norm_epsilon, config.norm_unit_offset, config.dtype), rngs=rngs
        )

    def initial(self, batch_size: int, max_length: int | None) -> Cache:
        config = self.config
        entries = ((config.groups, config.size),) * 2
        name, kept = type(self).__name__, self.kept
        empty = empty_cache(name, batch_size, entries, config.dtype, max_length=max_length, **kept)
        return empty._replace(frequencies=self.position.frequencies_until(batch_size, max_length))

    def mix(
        self,
        x: Float[Array, "b t d"],
        carried: Cache | CacheState | None,
        segments: Segments | None,
        visit: Visit | None,
    ) -> tuple[Float[Array, "b t d"], Cache | CacheState | None]:
        config = self.config
        options = {
            "causal": config.causal,
            "logits": self.logits(),
            "scale": config.scale,
        }
        attend = relative_attention
        if config.sink_distance != "true":
            attend = partial(streaming_attention, distance=config.sink_distance)
        if visit is None:
            positions = jnp.arange(x.shape[1])[None] if segments is None else segments.positions
            q, k, v = self.project(x, positions, segments, self.position.frequencies(positions, segments))
            options |= {"mask": self.mask(x.shape[1]), "segment_ids": segments}
            if segments is not None and segments.gates is not None:
                gates = segments.gates[:, None, None]
                options["logits"] = dataclasses.replace(options["logits"], bias=gates)
            o = attend(self.position, q, k, v, **options)
            return self.finish(o, x), None
        turned = carried.frequencies[:, None] if self.reads_lengths else None
        q, k, v = self.project(x, visit.positions, segments, turned)
        if isinstance(carried, CacheState):
            o, carried = carried.attend(self.view(), q, k, v, visit)
            return self.finish(o, x), carried
        carried, seen, beyond = extend(carried, (k, v), visit, **self.kept)
        tokens = Tokens(seen.numbers, visit.positions, seen.positions)
        options |= {"mask": self.mask(seen.numbers.shape[1]), "segment_ids": visit.numbers}
        o = attend(self.position, q, *seen.entries, tokens=tokens, **options)
        return jnp.where(beyond[..., None], jnp.nan, self.finish(o, x)), carried

    def mask(self, length: int) -> Mask:
        """Returns which keys at positions below `length` a query sees, besides `causal`."""
        return Mask(window=self.config.window, sink_tokens=self.config.sink_tokens)

    @property
    def kept(self) -> dict[str, int | None]:
        """Which tokens the cache holds: the `window` and `sinks` of `empty_cache` and `extend`."""
        return {"window": self.config.window, "sinks": self.config.sink_tokens}

    @property
    def takes_cache_policy(self) -> bool:
        """Whether a policy of `layers.caches` may stand in place of the cache: one of all tokens, which `mix` here reads."""
        return self.takes_gaps and self.causal and self.config.window is None and not self.reads_lengths

    @property
    def takes_gaps(self) -> bool:
        """Whether positions may have gaps: those that are read by `mix` and `mask` here are compared and encoded."""
        return type(self).mix is Attention.mix and type(self).mask is Attention.mask

    @property
    def takes_gates(self) -> bool:
        """Whether `segments.gates` are added to logits, as `mix` here does."""
        return type(self).mix is Attention.mix and self.config.sink_distance == "true"

    def view(self) -> View:
        """Returns how queries weigh keys, for a policy."""
        return View(self.position, self.logits(), self.config.scale, (self.key, self.value))

    def logits(self) -> Logits:
        """Returns what happens to the logits besides biases of positions."""
        sinks = None if self.sinks is None else self.sinks[...]
        return Logits(logit_cap=self.config.logit_cap, sink_logits=sinks)

    def project(
        self,
        x: Float[Array, "b t d"],
        positions: Int[Array, "#b t"],
        segments: Segments | None,
        turned: Float[Array, "#b #t _"] | None = None,
    ) -> tuple[Float[Array, "b t h k"], Float[Array, "b t g k"], Float[Array, "b t g k"]]:
        """Returns queries, keys and values of each token, normalized and rotated as configured."""
        q, k, v = self.heads(x)
        q, k = (self.position.rotate(y, positions, turned) for y in (q, k))
        return q, k, v

    def heads(
        self, x: Float[Array, "b t d"], placed: Float[Array, "b t d"] | None = None
    ) -> tuple[Float[Array, "b t h k"], Float[Array, "b t g k"], Float[Array, "b t g k"]]:
        """Returns queries, keys and values before the rotation; queries and keys are of `placed`, if given."""
        config = self.config
        placed = x if placed is None else placed
        q, k, v = self.query(placed), self.key(placed), self.value(x)
        if config.qk_norm and config.norm_heads == "all":
            q, k = self.query_norm(q), self.key_norm(k)
        q = split_heads(q, config.heads)
        k, v = (split_heads(y, config.groups) for y in (k, v))
        if config.qk_norm and config.norm_heads == "each":
            q, k = self.query_norm(q), self.key_norm(k)
        return q, k if config.key_scale == 1 else config.key_scale * k, v

    def finish(self, o: Float[Array, "b t h k"], x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        """Returns the mixer's output, given the heads' outputs and the mixer's input."""
        return self.output(join_heads(o))
