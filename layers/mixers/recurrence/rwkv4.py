"""RWKV-4: averages over the past, weighted by keys and a decay per channel (Peng et al. 2023, arXiv:2305.13048)."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers.kernels.linear_recurrence import linear_recurrence
from layers.mixer import Mixer
from layers.options import ActivationDtype, Count, checked_dataclass
from layers.parameters import NO_DECAY, declared, linear
from layers.parts.running_maximum import EMPTY, running_maximum
from layers.parts.token_shift import token_shift
from layers.segments import SegmentIds, Segments
from layers.typing import Array, Float


@checked_dataclass
class RWKV4Config:
    """Options of `RWKV4`.

    Attributes:
      width: d, number of input and output features.
      zero_init: whether the matrices of keys, receptance and output start at zero, as in the authors' training; otherwise
        they start orthogonal, like that of values.
      layer, depth: index of the layer, from 0, and number of layers of the model; they set the initial decays and mixing
        weights.
      dtype: dtype of the activations; averages and states are float32.
    """

    width: int
    zero_init: bool = True
    layer: Count = 0
    depth: int = 1
    dtype: ActivationDtype = jnp.float32

    def __post_init__(self) -> None:
        if not 0 <= self.layer < self.depth:
            raise ValueError(f"layer={self.layer}, depth={self.depth}; expected 0 <= layer < depth")


class WKVState(NamedTuple):
    """Sums of weighted values and of weights over the past, scaled by exp(-top), and the log-scale `top`."""

    values: Float[Array, "b d"]
    weights: Float[Array, "b d"]
    top: Float[Array, "b d"]


class RWKV4Carry(NamedTuple):
    """What `RWKV4` carries: the last token, and the sums over the past, float32."""

    token: Float[Array, "b 1 d"]
    sums: WKVState


class RWKV4(Mixer):
    """The time mixing of RWKV-4.

        k, v, r = W_k m_k(x), W_v m_v(x), W_r m_r(x),    m(x)_t = mu * x_t + (1 - mu) * x_{t-1}
        y_t = W_o (sigmoid(r_t) * wkv_t)

    where wkv is the average of `wkv` below with the decay -exp(log_rate) and the bonus u of the current token.
    """

    isolates_tokens = True

    def __init__(self, config: RWKV4Config, *, rngs: nnx.Rngs):
        self.config = config
        orthogonal = nnx.initializers.orthogonal()
        first = nnx.initializers.zeros_init() if config.zero_init else orthogonal
        options = {"axes": ("embed", "inner"), "bias": False, "dtype": config.dtype, "rngs": rngs}
        self.key = linear(config.width, config.width, init=first, **options)
        self.value = linear(config.width, config.width, init=orthogonal, **options)
        self.receptance = linear(config.width, config.width, init=first, **options)
        self.output = linear(config.width, config.width, init=first, **options | {"axes": ("inner", "embed")})
        log_rate, bonus, mixing = _initial_values(config)
        self.log_rate = declared(jnp.asarray(log_rate, jnp.float32), axes=("inner",), **NO_DECAY)
        self.bonus = declared(jnp.asarray(bonus, jnp.float32), axes=("inner",), **NO_DECAY)
        # Of key, value and receptance.
        self.mixing = declared(jnp.asarray(mixing, jnp.float32), axes=(None, "embed"), **NO_DECAY)

    def initial(self, batch_size: int, max_length: int | None) -> RWKV4Carry:
        width = self.config.width
        return RWKV4Carry(jnp.zeros((batch_size, 1, width), jnp.float32), _empty(batch_size, width))

    def mix(
        self, x: Float[Array, "b t d"], carried: RWKV4Carry | None, segments: Segments | None
    ) -> tuple[Float[Array, "b t d"], RWKV4Carry]:
        config = self.config
        token, sums = (None, _empty(x.shape[0], config.width)) if carried is None else carried
        x = x.astype(config.dtype)
        before, token = token_shift(x, token, segment_ids=segments)
        mu = self.mixing[...].astype(config.dtype)[:, None, None]
        mixed = mu * x[None] + (1 - mu) * before[None]
        keys, values = self.key(mixed[0]), self.value(mixed[1])
        averages, sums = wkv(
            keys.astype(jnp.float32),
            values.astype(jnp.float32),
            -jnp.exp(self.log_rate[...]),
            self.bonus[...],
            sums,
            segment_ids=segments,
        )
        y = self.output(jax.nn.sigmoid(self.receptance(mixed[2])) * averages.astype(config.dtype))
        return y, RWKV4Carry(token, sums)


def wkv(
    keys: Float[Array, "b t d"],
    values: Float[Array, "b t d"],
    log_decay: Float[Array, " d"],
    bonus: Float[Array, " d"],
    state: WKVState,
    *,
    segment_ids: SegmentIds = None,
) -> tuple[Float[Array, "b t d"], WKVState]:
    """Returns weighted averages of the values so far, per channel.

        wkv_t = sum_{i<=t} e_ti v_i / sum_{i<=t} e_ti,    log e_ti = k_i + (t - 1 - i) log_decay, or k_t + bonus if i = t

    All exponentials are at most 1: sums are relative to their largest weight, which a scan of maxima finds first. The
    result does not depend on that scale, so no gradient flows through the maxima.
    """
    b, t, d = keys.shape
    steps = jnp.broadcast_to(log_decay[None, None], keys.shape)
    start, starts = jnp.zeros((b, t, 1), bool), None
    segments = Segments.of(segment_ids)
    if segments is not None:
        start, real = segments.starts[..., None], segments.real[..., None]
        keys, steps = jnp.where(real, keys, EMPTY), jnp.where(real, steps, 0)
        starts = start if segments.packed else None
    # Constants from here on: the largest weight after each token and before it.
    top = jax.lax.stop_gradient(running_maximum(keys, steps, starts, state.top))
    tops = jnp.concatenate([state.top[:, None], top], axis=1)
    earlier = jax.lax.stop_gradient(jnp.where(start, EMPTY, tops[:, :t]))
    kept, written = jnp.exp(earlier + steps - top), jnp.exp(keys - top)
    sums, final = linear_recurrence(
        jnp.concatenate([kept, kept], axis=-1),
        jnp.concatenate([written * values, written], axis=-1),
        initial_state=jnp.concatenate([state.values, state.weights], axis=-1),
        segment_ids=segments,
    )
    past = jnp.concatenate([state.values, state.weights], axis=-1)[:, None]
    past = jnp.where(start, 0, jnp.concatenate([past, sums], axis=1)[:, :t])
    now = keys + bonus[None, None]
    highest = jax.lax.stop_gradient(jnp.maximum(earlier, now))
    past_weight, weight = jnp.exp(earlier - highest), jnp.exp(now - highest)
    average = (past_weight * past[..., :d] + weight * values) / (past_weight * past[..., d:] + weight)
    return average, WKVState(final[:, :d], final[:, d:], tops[:, -1])


def _empty(batch_size: int, width: int) -> WKVState:
    """Returns the initial state."""
    zero = jnp.zeros((batch_size, width), jnp.float32)
    return WKVState(zero, zero, jnp.full_like(zero, EMPTY))


def _initial_values(config: RWKV4Config) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns log-rates of decay, bonuses, and mixing weights of key, value and receptance per channel."""
    channel = np.arange(config.width)
    upwards, downwards = config.layer / max(config.depth - 1, 1), 1 - config.layer / config.depth
    log_rate = -5 + 8 * (channel / max(config.width - 1, 1)) ** (0.7 + 1.3 * upwards)
    bonus = math.log(0.3) + 0.5 * ((channel + 1) % 3 - 1)
    share = channel / config.width
    mixing = np.stack([share**downwards, share**downwards + 0.3 * upwards, share ** (0.5 * downwards)])
    return log_rate, bonus, mixing
