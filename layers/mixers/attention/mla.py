"""MLA: attention that makes keys and values from one small vector per token (Liu et al. 2024, arXiv:2405.04434)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from layers.kernels.attention import Tokens, attention
from layers.mixer import Mixer, Visit
from layers.norms import NormConfig, RMSNorm
from layers.options import ActivationDtype, Count, checked_dataclass
from layers.parameters import linear
from layers.parts.cache import Cache, empty_cache, extend
from layers.parts.heads import join_heads, split_heads
from layers.positions import PositionConfig, Rotary, read_position, rotary
from layers.positions.position import NoPosition
from layers.segments import Segments
from layers.typing import Array, Float, Int


@checked_dataclass
class MLAConfig:
    """Options of `MLA`; the defaults of sizes are those of DeepSeek-V2 and V3.

    Attributes:
      width: d, number of input and output features.
      heads: h, number of heads.
      latent: r, number of features of the vector that keys and values are computed from.
      query_latent: number of features of the vector that queries are computed from; if None, they are computed from x.
      head_dim: features per query and key head that carry no position.
      rope_dim: further features per head, rotated by position; all heads share those of the keys.
      value_dim: features per value head.
      position: "rope" or a mapping with that "name" and the options of `layers.positions.Rotary`, whose amplitude acts on
        all features here; "none" keeps the `rope_dim` features without rotation (Kimi Linear).
      absorbed: whether attention runs over latent vectors, with the maps to keys and values moved to queries and
        outputs, or over keys and values. If None, calls with a state choose the form with fewer products, other calls the
        latter.
      scale: factor on the logits; 1 / sqrt(head_dim + rope_dim) if None.
      gate: whether a sigmoid of the input gates each feature of the heads' outputs, as in `gated_attention`.
      dtype: dtype of the activations and of the cache.
    """

    width: int
    heads: int = 8
    latent: int = 512
    query_latent: int | None = None
    head_dim: int = 128
    rope_dim: Count = 64
    value_dim: int = 128
    position: str | Mapping[str, Any] | PositionConfig = "rope"
    absorbed: bool | None = None
    scale: float | None = None
    gate: bool = False
    dtype: ActivationDtype = jnp.float32

    def __post_init__(self) -> None:
        object.__setattr__(self, "position", read_position(self.position))
        if not isinstance(self.position, Rotary | NoPosition):
            raise ValueError(
                f"position={self.position!r}; latent attention takes 'rope' or 'none', which leave keys free of the query"
            )
        if isinstance(self.position, Rotary):
            try:
                self.position.size(self.rope_dim)
            except ValueError as error:
                raise ValueError(f"rope_dim={self.rope_dim}: {error}; or use position='none'") from None


class MLA(Mixer):
    """MLA: multi-head latent attention, which caches one small vector per token (Liu et al. 2024, arXiv:2405.04434).

        c = norm(W_c x),  k_r = R W_r x               (b t r), (b t rope_dim): all that the cache holds
        k, v = W_k c, W_v c                           (b t h head_dim), (b t h value_dim)
        q, q_r = W_q x, R W_q' x                      or from norm(W_a x)
        y = W_o softmax((q k^T + q_r k_r^T) scale) v        with `gate`, W_o (softmax(.) v * sigmoid(W_g x))

    R rotates by the position in the segment. Since q . W_k c = (W_k^T q) . c, attention with one key/value head over the
    vectors c gives the same outputs (absorbed), with W_v after the softmax. The amplitude a of YaRN multiplies all logits
    by a^2, as in the authors' code.

    The cache holds latent vectors and rotated keys, latent + rope_dim numbers per token. It has `max_length` slots, and
    outputs of later tokens are NaN.
    """

    keeps_segments = True

    def __init__(self, config: MLAConfig, *, rngs: nnx.Rngs):
        self.config = config
        options = {"bias": False, "dtype": config.dtype, "rngs": rngs}
        size = config.head_dim + config.rope_dim
        if config.query_latent is None:
            self.query_down = self.query_norm = None
        else:
            self.query_down = linear(config.width, config.query_latent, axes=("embed", None), **options)
            self.query_norm = RMSNorm(NormConfig(config.query_latent, dtype=config.dtype), rngs=rngs)
        axes = ("embed" if config.query_latent is None else None, "heads")
        self.query = linear(config.query_latent or config.width, config.heads * size, axes=axes, **options)
        self.latent = linear(config.width, config.latent + config.rope_dim, axes=("embed", None), **options)
        self.latent_norm = RMSNorm(NormConfig(config.latent, dtype=config.dtype), rngs=rngs)
        expanded = config.heads * (config.head_dim + config.value_dim)
        self.expand = linear(config.latent, expanded, axes=(None, "heads"), **options)
        values = config.heads * config.value_dim
        self.gate = linear(config.width, values, axes=("embed", "heads"), **options) if config.gate else None
        self.output = linear(values, config.width, axes=("heads", "embed"), **options)

    def initial(self, batch_size: int, max_length: int | None) -> Cache:
        shapes = ((self.config.latent,), (self.config.rope_dim,))
        return empty_cache("mla", batch_size, shapes, self.config.dtype, max_length=max_length)

    def mix(
        self,
        x: Float[Array, "b t d"],
        carried: Cache | None,
        segments: Segments | None,
        visit: Visit | None,
    ) -> tuple[Float[Array, "b t d"], Cache | None]:
        if visit is None:
            positions = jnp.arange(x.shape[1])[None] if segments is None else segments.positions
            queries, entries = self.project(x, positions)
            return self._finish(self.attend(queries, entries, segments), x), None
        queries, entries = self.project(x, visit.positions)
        carried, seen, beyond = extend(carried, entries, visit)
        tokens = Tokens(seen.numbers, visit.positions, seen.positions)
        o = self.attend(queries, seen.entries, visit.numbers, tokens)
        return jnp.where(beyond[..., None], jnp.nan, self._finish(o, x)), carried

    def project(
        self, x: Float[Array, "b t d"], positions: Int[Array, "#b t"]
    ) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """Returns what queries are, without position and rotated; and what the cache holds per token."""
        return self._queries(self.query_source(x), positions), self._latents(x, positions)

    def query_source(self, x: Float[Array, "b t d"]) -> Float[Array, "b t u"]:
        """Returns what queries are computed from: x or its small vector."""
        return x if self.query_down is None else self.query_norm(self.query_down(x))

    def _finish(self, o, x):
        """Returns the output, given those of the heads."""
        o = join_heads(o)
        return self.output(o if self.gate is None else o * jax.nn.sigmoid(self.gate(x)))

    def _queries(self, source, positions):
        """Returns queries without position (b t h head_dim) and rotated ones (b t h rope_dim)."""
        q = split_heads(self.query(source), self.config.heads)
        return q[..., : self.config.head_dim], self.turn(q[..., self.config.head_dim :], positions)

    def _latents(self, x, positions):
        """Returns what the cache holds: latent vectors (b t r) and rotated keys (b t rope_dim)."""
        c = self.latent(x)
        turned = self.turn(c[:, :, None, self.config.latent :], positions)
        return self.latent_norm(c[..., : self.config.latent]), turned[:, :, 0]

    def turn(self, x: Float[Array, "b t h k"], positions: Int[Array, "#b t"]) -> Float[Array, "b t h k"]:
        """Returns heads rotated by position, without the amplitude of the positions."""
        rope = self.config.position
        return (
            rotary(x, positions, dataclasses.replace(rope, amplitude=1.0)) if isinstance(rope, Rotary) else x
        )

    @property
    def scale(self) -> float:
        """Factor on the logits."""
        config = self.config
        scale = (config.head_dim + config.rope_dim) ** -0.5 if config.scale is None else config.scale
        return scale * (config.position.gain**2 if isinstance(config.position, Rotary) else 1)

    def attend(self, queries, entries, segment_ids, tokens=None) -> Float[Array, "b t h v"]:
        """Returns the heads' outputs, given what `project` returns, with the entries of all tokens."""
        q, k, v, outer = self.heads(*queries, *entries, cached=tokens is not None)
        return outer(
            attention(q, k, v, causal=True, scale=self.scale, segment_ids=segment_ids, tokens=tokens)
        )

    def heads(self, q, q_turned, c, k_turned, *, cached):
        """Returns queries, keys and values over latent vectors c (b s r) and rotated keys (b s rope_dim).

        Attention is over the vectors c, or over what they are expanded to; the last result is the map from what it gives to the
        outputs of the heads (b t h value_dim).
        """
        config = self.config
        to_key, to_value = jnp.split(
            self.expand.matrix.astype(config.dtype).reshape(config.latent, config.heads, -1),
            [config.head_dim],
            axis=2,
        )
        if self._absorbs(q.shape[1], c.shape[1], cached=cached):
            q = jnp.concatenate([jnp.einsum("bthk,rhk->bthr", q, to_key), q_turned], axis=-1)
            k = jnp.concatenate([c, k_turned], axis=-1)[:, :, None]
            return q, k, c[:, :, None], lambda o: jnp.einsum("bthr,rhv->bthv", o, to_value)
        k, v = jnp.einsum("bsr,rhk->bshk", c, to_key), jnp.einsum("bsr,rhv->bshv", c, to_value)
        k_turned = jnp.broadcast_to(k_turned[:, :, None], (*k.shape[:3], config.rope_dim))
        q, k = jnp.concatenate([q, q_turned], axis=-1), jnp.concatenate([k, k_turned], axis=-1)
        return q, k, v, lambda o: o

    def _absorbs(self, t, s, *, cached):
        """Returns whether to attend to latent vectors: as configured, or where that takes fewer products per head."""
        config = self.config
        if config.absorbed is not None:
            return config.absorbed
        outside = config.latent * (config.head_dim + config.value_dim)
        plain = s * outside + t * s * (config.head_dim + config.rope_dim + config.value_dim)
        absorbed = t * outside + t * s * (2 * config.latent + config.rope_dim)
        return cached and absorbed < plain
