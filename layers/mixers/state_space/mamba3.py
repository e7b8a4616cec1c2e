"""Mamba-3: trapezoidal, rotating states without a short convolution (Lahoti et al. 2026, arXiv:2603.15569)."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from layers.kernels.gated_linear_attention import gated_linear_attention
from layers.kernels.linear_recurrence import linear_recurrence
from layers.mixer import Mixer
from layers.norms import NormConfig, RMSNorm
from layers.options import ActivationDtype, NonNegative, Positive, checked_dataclass
from layers.parameters import NO_DECAY, linear, parameter
from layers.parts.projection import project
from layers.parts.state_space import check_steps
from layers.parts.step_size import step_size_bias
from layers.parts.token_shift import token_shift
from layers.segments import Segments
from layers.typing import Array, Complex, Float


@checked_dataclass
class Mamba3Config:
    """Options of `Mamba3`.

    Attributes:
      width: d, number of input and output features.
      state_size: n, features of B and C.
      expand: e / d, channels inside per feature.
      head_dim: p, channels per head.
      groups: g, number of groups of B and C; divides the heads.
      rank: r, inputs and outputs of the state per channel; more than 1 for multiple inputs and outputs (MIMO), 4 in the authors' code.
      rotated: share of the state's features that rotate, in pairs.
      rate_floor: smallest rate of decay, -A.
      dt_min, dt_max, dt_floor: range of the initial step sizes, log-uniform, and their least value.
      epsilon: epsilon of the norms of B and C.
      dtype: dtype of the activations; decays, rotations and state are float32 or complex64.
    """

    width: int
    state_size: int = 128
    expand: int = 2
    head_dim: int = 64
    groups: int = 1
    rank: int = 1
    rotated: Positive = 0.5
    rate_floor: Positive = 1e-4
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_floor: NonNegative = 1e-4
    epsilon: NonNegative = 1e-5
    dtype: ActivationDtype = jnp.float32

    def __post_init__(self) -> None:
        if self.channels % self.head_dim:
            raise ValueError(
                f"head_dim={self.head_dim} does not divide expand * width = {self.channels}; choose one that does"
            )
        if self.heads % self.groups:
            raise ValueError(f"groups={self.groups} does not divide the {self.heads} heads")
        if self.rotated > 1 or self.pairs < 1:
            raise ValueError(
                f"rotated={self.rotated} of state_size={self.state_size}; expected a share of at most 1 that makes a pair"
            )
        check_steps(self.dt_min, self.dt_max)

    @property
    def channels(self) -> int:
        """e."""
        return self.expand * self.width

    @property
    def heads(self) -> int:
        """h."""
        return self.channels // self.head_dim

    @property
    def pairs(self) -> int:
        """Number of pairs of features that rotate."""
        return int(self.rotated * self.state_size) // 2


class Mamba3Carry(NamedTuple):
    """What `Mamba3` carries: the rotation so far, B and inputs of the last token, and the state S."""

    turn: Complex[Array, "b f"]
    last: Float[Array, "b 1 f"]
    s: Float[Array, "b h n p"]


class Mamba3(Mixer):
    """Mamba-3's block, with e = expand d channels in h heads of p inside, and r inputs and outputs of the state.

        [z, u, B, C, dt, a, l, w] = W_in x                               (e, e, r g n, r g n, h, h, h, pairs)
        dt_t = softplus(dt_t + b_dt),   A_t = -max(f(a_t), rate_floor),   lambda_t = sigmoid(l_t)
        B_t, C_t = R_t (RMSNorm(B_t) + b_B), R_t (RMSNorm(C_t) + b_C)    b: (h, r, n)
        S_t = alpha_t S_{t-1} + (1 - lambda_t) dt_t alpha_t B_{t-1} u_{t-1}^T + lambda_t dt_t B_t u_t^T
        y   = W_out ((S_t^T C_t + D u_t) silu(z))                        alpha_t = exp(dt_t A_t), per head

    This is r = 1. With r > 1, B_t u_t^T is sum_j B_tj (f_j u_t)^T, and (.) silu(z) is sum_j o_j (S_t^T C_tj + D f_j u_t) silu(g_j z), where
    f, g and o (h, r, p) are learned and start at 1 / r, 1 and 1 / r: one state that r products write and read per token.

    R_t turns pairs (2 i, 2 i + 1) of features by the sum of dt pi tanh(w_i) over the tokens of the segment so far, which makes
    the state complex. lambda = 1 is Mamba-2's discretization, and 1/2 the trapezoidal rule. f(a) = 1 + a for a >= 0 and
    1 / (1 - a) below, as in the authors' code; all else that the paper leaves open is theirs as well. Head i reads group
    i // (h / g). Both terms of S are one call of linear attention with 2 r^2 times the heads, a state for each pair of an input and an output, so
    that time grows with r^2; the state that is carried does not grow.
    """

    def __init__(self, config: Mamba3Config, *, rngs: nnx.Rngs):
        self.config = config
        channels, heads, n = config.channels, config.heads, config.state_size
        options = {"bias": False, "dtype": config.dtype, "rngs": rngs}
        features = 2 * channels + 2 * config.rank * config.groups * n + 3 * heads + config.pairs
        self.input = linear(config.width, features, axes=("embed", "inner"), **options)
        steps = step_size_bias(config.dt_min, config.dt_max, config.dt_floor)
        ones = nnx.initializers.ones_init()
        self.dt_bias = parameter(rngs, steps, (heads,), axes=("heads",), **NO_DECAY)
        # Of B, then of C.
        shape = (2, heads, n) if config.rank == 1 else (2, heads, config.rank, n)
        axes = (None, "heads", *[None] * (len(shape) - 2))
        self.offsets = parameter(rngs, ones, shape, axes=axes, **NO_DECAY)
        norm = NormConfig(n, config.epsilon)
        self.key_norm, self.query_norm = RMSNorm(norm, rngs=rngs), RMSNorm(norm, rngs=rngs)
        self.d = parameter(rngs, ones, (heads,), axes=("heads",), **NO_DECAY)
        self.inputs = self._factors(1 / config.rank, rngs)
        self.gates = self._factors(1.0, rngs)
        self.outputs = self._factors(1 / config.rank, rngs)
        self.output = linear(channels, config.width, axes=("inner", "embed"), **options)

    def _factors(self, start: float, rngs: nnx.Rngs) -> nnx.Param | None:
        """Returns a factor for each input or output of each channel, if there are several."""
        config = self.config
        shape, init = (config.heads, config.rank, config.head_dim), nnx.initializers.constant(start)
        if config.rank == 1:
            return None
        return parameter(rngs, init, shape, axes=("heads", None, None), **NO_DECAY)

    def initial(self, batch_size: int, max_length: int | None) -> Mamba3Carry:
        config = self.config
        heads, n, p = config.heads, config.state_size, config.head_dim
        return Mamba3Carry(
            jnp.ones((batch_size, heads * config.pairs), jnp.complex64),
            jnp.zeros((batch_size, 1, heads * (config.rank * n + p)), jnp.float32),
            jnp.zeros((batch_size, heads, n, p), jnp.float32),
        )

    def mix(
        self, x: Float[Array, "b t d"], carried: Mamba3Carry | None, segments: Segments | None
    ) -> tuple[Float[Array, "b t d"], Mamba3Carry]:
        config = self.config
        turn, last, s = self.initial(x.shape[0], None) if carried is None else carried
        heads, n, p, r = config.heads, config.state_size, config.head_dim, config.rank
        rows, shared = x.shape[:2], config.groups * config.state_size * r
        z, u, *bc, dt, rate, share, angle = project(
            self.input, x, (*(config.channels,) * 2, shared, shared, *(heads,) * 3, config.pairs)
        )
        dt, rate, share, angle = (part.astype(jnp.float32) for part in (dt, rate, share, angle))
        dt = jax.nn.softplus(dt + self.dt_bias[...][None, None])
        log_decay = -dt * jnp.maximum(_rate(rate), config.rate_floor)
        turns, turn = self._turns(dt[..., None] * (math.pi * jnp.tanh(angle))[:, :, None], turn, segments)

        def vectors(norm, part, offset):
            """Rotated B or C by head, (b, t, h, r, n)."""
            part = jnp.moveaxis(norm(part.reshape(*rows, r, config.groups, n)), 2, 3)
            part = jnp.repeat(part, heads // config.groups, axis=2) + offset[None, None]
            return _rotated(part, turns[:, :, :, None])

        of_keys, of_queries = self.offsets[...].reshape(2, heads, r, n)
        key = vectors(self.key_norm, bc[0], of_keys)
        query = vectors(self.query_norm, bc[1], of_queries)
        u = u.reshape(*rows, heads, p)
        now = jnp.concatenate([key.reshape(*rows, heads * r * n), u.reshape(*rows, heads * p)], axis=-1)
        before, last = token_shift(now.astype(config.dtype), last, segment_ids=segments)
        key_before, u_before = jnp.split(before, [heads * r * n], axis=-1)
        share = jax.nn.sigmoid(share)
        u = _each(u, self.inputs)
        values = (
            (share * dt)[..., None, None] * u,
            ((1 - share) * dt * jnp.exp(log_decay))[..., None, None]
            * _each(u_before.reshape(*rows, heads, p), self.inputs),
        )

        def of_heads(*terms):
            """Both terms of S, in the type of activations, as heads side by side."""
            joined = jnp.stack(terms, axis=2).astype(config.dtype)
            return joined.reshape(*rows, math.prod(joined.shape[2:-1]), joined.shape[-1])

        # Every output reads what every input writes: a head for each pair, which shares keys and values with r - 1 others.
        query = jnp.broadcast_to(query[:, :, :, None], (*rows, heads, r, r, n))
        s = jnp.zeros((s.shape[0], 2, heads, r, r, n, p), s.dtype).at[:, 0, :, 0].set(s[:, :, None])
        y, s = gated_linear_attention(
            of_heads(query, query),
            of_heads(key, key_before.reshape(key.shape)),
            of_heads(*values),
            log_decay=jnp.tile(jnp.repeat(log_decay, r * r, axis=2), (1, 1, 2)),
            scale=1.0,
            initial_state=s.reshape(s.shape[0], 2 * heads * r * r, n, p),
            segment_ids=segments,
        )
        y = y.astype(jnp.float32).reshape(*rows, 2, heads, r, r, p).sum((2, 4))
        y = y + self.d[...][None, None, :, None, None] * u
        y = y * jax.nn.silu(_each(z.astype(jnp.float32).reshape(*rows, heads, p), self.gates))
        y = (y if self.outputs is None else y * self.outputs[...][None, None]).sum(3)
        s = s.reshape(s.shape[0], 2, heads, r, r, n, p)[:, :, :, :, 0].sum((1, 3))
        y = self.output(y.astype(config.dtype).reshape(*rows, config.channels))
        return y, Mamba3Carry(turn, last, s)

    def _turns(
        self, angles: Float[Array, "b t h m"], turn: Complex[Array, "b f"], segments: Segments | None
    ) -> tuple[Complex[Array, "b t h m"], Complex[Array, "b f"]]:
        """Returns exp(i sum of angles) at each token, and at the last."""
        flat = angles.reshape(*angles.shape[:2], angles.shape[2] * angles.shape[3])
        step = jax.lax.complex(jnp.cos(flat), jnp.sin(flat))
        # A product has no whole turns, in which a sum would lose digits. It starts anew with a segment.
        if segments is None:
            begun = jnp.zeros_like(step)
        else:
            begun = jnp.where(segments.starts[..., None], step, 0)
        turns, turn = linear_recurrence(step, begun, initial_state=turn, segment_ids=segments)
        return turns.reshape(angles.shape), turn


def _rate(a: jax.Array) -> jax.Array:
    """Returns a positive rate that is smooth and decreases no faster than 1 / (1 - a)."""
    return jnp.maximum(a, 0) + 1 / (1 - jnp.minimum(a, 0))


def _each(x: Float[Array, "b t h p"], factors: nnx.Param | None) -> Float[Array, "b t h r p"]:
    """Returns x times the factors of each input or output, float32 where there are several."""
    return x[:, :, :, None] if factors is None else x[:, :, :, None] * factors[...][None, None]


def _rotated(x: Float[Array, "b t h r n"], turns: Complex[Array, "b t h 1 m"]) -> Float[Array, "b t h r n"]:
    """Returns x with its first 2 m features turned in pairs."""
    size = 2 * turns.shape[4]
    pairs = x[..., :size].reshape(*x.shape[:4], turns.shape[4], 2)
    turned = jax.lax.complex(pairs[..., 0], pairs[..., 1]) * turns
    turned = jnp.stack([turned.real, turned.imag], axis=-1).reshape(*x.shape[:4], size)
    return jnp.concatenate([turned, x[..., size:]], axis=-1)
