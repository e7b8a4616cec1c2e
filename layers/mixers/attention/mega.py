"""MEGA: single-head gated attention over moving averages, whole or within chunks (Ma et al. 2022, arXiv:2209.10655)."""

import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from layers.mixer import SELF, Mixer, Visit
from layers.options import ActivationDtype, checked_dataclass
from layers.parameters import NO_DECAY, linear, parameter
from layers.parts.blocks import in_blocks, with_neighbours
from layers.parts.cache import Cache, empty_cache, extend
from layers.parts.moving_average import MovingAverage
from layers.parts.segmented_convolution import pack_rows
from layers.positions import rotary
from layers.segments import Segments, keep_where
from layers.typing import Array, Float

_normal = nnx.initializers.normal(0.02)


@checked_dataclass
class MegaConfig:
    """Options of `Mega`.

    Attributes:
      width: d, number of input and output features.
      key_dim: s, number of features of queries and keys.
      value_dim: e, number of features of values; twice the width if None.
      averages: n, number of moving averages per channel.
      attention: "softmax", or "laplace" (weights are not normalized; logits are divided by the number of keys).
      chunk: chunk length in tokens, counted from the start of the segment. A token attends only to its chunk, or to all
        tokens if None.
      bidirectional: whether averages and attention run in both directions; not causal.
      position_bias: bias of the logits by distance: "rotary", the product of two learned vectors rotated by position, or
        "simple", one learned number per distance.
      max_length: length of the longest sequence with position_bias="simple" and no chunk; outputs that need more are NaN.
      dtype: dtype of the activations and of cached keys and values; averages are float32.
    """

    width: int
    key_dim: int = 64
    value_dim: int | None = None
    averages: int = 16
    attention: Literal["softmax", "laplace"] = "softmax"
    chunk: int | None = None
    bidirectional: bool = False
    position_bias: Literal["rotary", "simple"] = "rotary"
    max_length: int | None = None
    dtype: ActivationDtype = jnp.float32

    def __post_init__(self) -> None:
        if self.position_bias == "rotary" and self.key_dim % 2:
            raise ValueError(f"key_dim={self.key_dim} is odd; position_bias='rotary' needs an even one")
        if (self.max_length is not None) != (self.position_bias == "simple" and self.chunk is None):
            raise ValueError(
                f"max_length={self.max_length} with position_bias={self.position_bias!r} and chunk={self.chunk}; "
                "it is needed with position_bias='simple' and no chunk, and only there"
            )

    @property
    def values(self) -> int:
        """Number of features of values."""
        return self.value_dim or 2 * self.width

    @property
    def reach(self) -> int | None:
        """Distances that the table of position_bias="simple" covers."""
        return self.chunk or self.max_length


class MegaCarry(NamedTuple):
    """What `Mega` carries: the moving averages, and the keys and values of the last chunk or of all tokens."""

    averages: Float[Array, "b d n"]
    cache: Cache


class Mega(Mixer):
    """MEGA: moving average equipped gated attention (Ma et al. 2022, arXiv:2209.10655).

        m = moving_average(x)                                               (see `MovingAverage`)
        v = silu(W_v x);  [u, z, r, c] = W_m m;  z, r = silu(z), silu(r)    (sizes e; d, s, e, d)
        q, k = gamma_1 * z + beta_1, gamma_2 * z + beta_2
        o = f(q k^T * scale + bias) v
        y = sigmoid(u) * (silu(c + W_o (r * o)) - x)

    f is softmax with scale s^(-1/2), or with "laplace" (1 + erf((a - sqrt(1/2)) / sqrt(1/(2 pi)))) / 2 of each logit a,
    with scale one over the number of keys that the query sees.

    The paper adds y to the residual, and subtracts the residual in y. A block that normalizes the sum does exactly that;
    with the norm before the mixer, the normalized input is subtracted instead.

    Without a chunk the cache has `max_length` slots, and outputs of later tokens are NaN.
    """

    patterns = SELF
    keeps_segments = True

    def __init__(self, config: MegaConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.causal = not config.bidirectional
        width, keys, values = config.width, config.key_dim, config.values
        options = {"dtype": config.dtype, "rngs": rngs}
        self.average = MovingAverage(width, config.averages, bidirectional=config.bidirectional, **options)
        inward = {"axes": ("embed", "inner"), "init": _normal, **options}
        self.value = linear(width, values, **inward)
        self.mixed = linear(width, 2 * width + keys + values, **inward)
        self.output = linear(values, width, **inward | {"axes": ("inner", "embed")})
        # Of query and key.
        self.gamma = parameter(rngs, _normal, (2, keys), **NO_DECAY)
        self.beta = parameter(rngs, nnx.initializers.zeros_init(), (2, keys), **NO_DECAY)
        if config.position_bias == "rotary":
            self.bias = parameter(rngs, _normal, (2, keys), **NO_DECAY)
        else:
            distances = config.reach if self.causal else 2 * config.reach - 1
            self.bias = parameter(rngs, _normal, (distances,), **NO_DECAY)

    def initial(self, batch_size: int, max_length: int | None) -> MegaCarry:
        config = self.config
        shapes = (config.key_dim,), (config.values,)
        slots = {"max_length": max_length, "window": config.chunk}
        cache = empty_cache("MEGA", batch_size, shapes, config.dtype, **slots)
        return MegaCarry(self.average.init_state(batch_size), cache)

    def mix(
        self,
        x: Float[Array, "b t d"],
        carried: MegaCarry | None,
        segments: Segments | None,
        visit: Visit | None,
    ) -> tuple[Float[Array, "b t d"], MegaCarry | None]:
        config = self.config
        x = x.astype(config.dtype)
        h = cache = None
        if carried is not None:
            h = keep_where(visit.continues, carried.averages, jnp.zeros_like(carried.averages))
        m, h = self.average(x, h, segment_ids=segments)
        width, keys = config.width, config.key_dim
        borders = [width, width + keys, width + keys + config.values]
        u, z, r, c = jnp.split(self.mixed(m), borders, axis=-1)
        gamma, beta = (v[...].astype(config.dtype)[:, None, None] for v in (self.gamma, self.beta))
        q, k = gamma * jax.nn.silu(z)[None] + beta
        v = jax.nn.silu(self.value(x))
        if carried is None:
            o = self._whole(q, k, v, segments)
        else:
            o, cache = self._continued(q, k, v, carried.cache, visit)
        candidate = jax.nn.silu(c + self.output(jax.nn.silu(r) * o))
        y = jax.nn.sigmoid(u) * (candidate - x)
        return y, None if carried is None else MegaCarry(h, cache)

    def _whole(self, q, k, v, segments):
        """Attends over the whole sequence, in blocks of one chunk: the cost grows with length times chunk."""
        time = q.shape[1]
        if segments is None:
            packing, numbers = None, jnp.ones((1, time), jnp.int32)
            positions = jnp.arange(time)[None]
        else:
            packing = pack_rows(segments)
            numbers, positions = packing.numbers, packing.pack(segments.positions)
            q, k, v = map(packing.pack, (q, k, v))
        blocks = functools.partial(in_blocks, size=min(self.config.chunk or max(time, 1), max(time, 1)))
        q, k, v, *at = map(blocks, (q, k, v, numbers, positions))
        there = at
        if packing is not None and q.shape[1] > 1:
            # Chunks are aligned with segments and therefore straddle blocks.
            k, v, *there = (with_neighbours(tokens, ahead=not self.causal) for tokens in (k, v, *at))
        o = self._attend(q, k, v, at, there)
        o = o.reshape(o.shape[0], o.shape[1] * o.shape[2], o.shape[3])[:, :time]
        return o if packing is None else packing.unpack(o)

    def _continued(self, q, k, v, cache, visit):
        """Attends over the cache and the new tokens, `chunk` at a time; returns outputs and the extended cache."""
        time, chunk = q.shape[1], self.config.chunk

        def run(cache, tokens):
            q, *new, numbers, positions = tokens
            here = visit._replace(numbers=numbers, positions=positions)
            cache, seen, beyond = extend(cache, tuple(new), here, window=chunk)
            q, k, v, *at = (x[:, None] for x in (q, *seen.entries, numbers, positions))
            o = self._attend(q, k, v, at, (seen.numbers[:, None], seen.positions[:, None]))[:, 0]
            return cache, jnp.where(beyond[..., None], jnp.nan, o)

        tokens = (q, k, v, visit.numbers, visit.positions)
        if chunk is None or time <= chunk:
            cache, o = run(cache, tokens)
            return o, cache
        blocks = tuple(jnp.swapaxes(in_blocks(x, size=chunk), 0, 1) for x in tokens)
        cache, o = jax.lax.scan(run, cache, blocks)
        o = jnp.swapaxes(o, 0, 1)
        return o.reshape(o.shape[0], o.shape[1] * chunk, o.shape[3])[:, :time], cache

    def _attend(self, q, k, v, at, there):
        """Returns f(q k^T scale + bias) v in each block, (b, m, t, e).

        Args:
          q, k, v: (b, m, t, s), (b, m, keys, s), (b, m, keys, e).
          at, there: segment number (0 for none) and position in the segment, of queries and of keys: (b or 1, m, ...).
        """
        config = self.config
        (number, position), (key_number, key_position) = at, there
        seen = (number[..., None] == key_number[..., None, :]) & (number[..., None] != 0)
        if config.chunk is not None:
            seen &= (position // config.chunk)[..., None] == (key_position // config.chunk)[..., None, :]
            position, key_position = position % config.chunk, key_position % config.chunk
        if self.causal:
            seen &= position[..., None] >= key_position[..., None, :]
        # Products of all pairs meet tokens that are not seen, and 0 x NaN is NaN.
        finite = [jnp.isfinite(x).all(-1, keepdims=True) for x in (q, k, v)]
        q, k, v = (jnp.where(good, x, 0) for good, x in zip(finite, (q, k, v)))
        lost = ~finite[0] | (seen & ~(finite[1] & finite[2])[..., 0][..., None, :]).any(-1, keepdims=True)
        logits = jnp.einsum("bmts,bmks->bmtk", q, k, preferred_element_type=jnp.float32)
        bias = self._bias(position, key_position)
        if config.attention == "softmax":
            logits = jnp.where(seen, config.key_dim**-0.5 * logits + bias, -1e30)
            weights = jnp.where(seen, jax.nn.softmax(logits, axis=-1), 0)
        else:
            count = jnp.maximum(seen.sum(-1, keepdims=True), 1).astype(jnp.float32)
            weights = jnp.where(seen, laplace(logits / count + bias), 0)
        o = jnp.einsum("bmtk,bmke->bmte", weights.astype(v.dtype), v)
        return jnp.where(lost, jnp.nan, o)

    def _bias(self, position, key_position):
        """Returns the bias of the logits, (b or 1, m, t, keys)."""
        if self.config.position_bias == "simple":
            distance = position[..., None] - key_position[..., None, :]
            index = distance if self.causal else distance + self.config.reach - 1
            inside = (index >= 0) & (index < self.bias.shape[0])
            return jnp.where(inside, self.bias[...].at[index].get(mode="clip"), jnp.nan)

        def turned(vector, position):
            flat = position.reshape(position.shape[0], math.prod(position.shape[1:]))
            tokens = jnp.broadcast_to(vector, (*flat.shape, 1, len(vector)))
            return rotary(tokens, flat).reshape(*position.shape, len(vector))

        query, key = turned(self.bias[0], position), turned(self.bias[1], key_position)
        return jnp.einsum("bmts,bmks->bmtk", query, key)


def laplace(a: Float[Array, "*a"]) -> Float[Array, "*a"]:
    """The distribution function of a normal variable of mean sqrt(1/2) and variance 1 / (4 pi): a smooth squared ReLU."""
    return 0.5 * (1 + jax.lax.erf((a - math.sqrt(0.5)) * math.sqrt(2 * math.pi)))
