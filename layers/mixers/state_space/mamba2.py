"""Mamba-2: a gated state space with one decay per head and token (Dao and Gu 2024, arXiv:2405.21060)."""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from layers.kernels.gated_linear_attention import gated_linear_attention
from layers.mixer import Mixer
from layers.options import ActivationDtype, Infinite, NonNegative, checked_dataclass
from layers.parameters import NO_DECAY, linear, log_of_uniform, parameter, uniform_fan_in
from layers.parts.projection import project
from layers.parts.short_convolution import ShortConvolution
from layers.parts.state_space import check_steps
from layers.parts.step_size import step_size_bias
from layers.segments import Segments
from layers.typing import Array, Float


@checked_dataclass
class Mamba2Config:
    """Options of `Mamba2`.

    Attributes:
      width: d, number of input and output features.
      state_size: n, number of states per channel, the size of B and C.
      expand: number of channels of the state space as a multiple of width.
      inner: e, number of channels of the state space; expand * width if None (Falcon-H1, Nemotron-H).
      head_dim: p, channels per head; they share a decay.
      groups: g, number of pairs of B and C; divides the heads. The norm is over the channels of a group.
      taps: w, number of inputs that the short convolution sees.
      a_min, a_max: range of the initial decay rates, uniform.
      dt_min, dt_max: range of the initial step sizes, log-uniform.
      dt_floor: lower bound of the initial step sizes.
      dt_limit: interval that step sizes are clipped to.
      scales: factors on z, u, B, C and dt as they are projected (Falcon-H1).
      norm: whether RMSNorm stands "after" the gate, "before" it, or nowhere, "none".
      conv_bias: whether the short convolution has a bias.
      bias: whether the outer projections have biases.
      epsilon: epsilon of the norm.
      depth: number of layers of the model; the initial output projection is divided by its root.
      dtype: dtype of the activations; the state is float32.
    """

    width: int
    state_size: int = 128
    expand: int = 2
    inner: int | None = None
    head_dim: int = 64
    groups: int = 1
    taps: int = 4
    a_min: float = 1.0
    a_max: float = 16.0
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_floor: NonNegative = 1e-4
    dt_limit: tuple[Infinite, Infinite] = (0.0, math.inf)
    scales: tuple[float, float, float, float, float] = (1.0, 1.0, 1.0, 1.0, 1.0)
    norm: Literal["after", "before", "none"] = "after"
    conv_bias: bool = True
    bias: bool = False
    epsilon: NonNegative = 1e-5
    depth: int = 1
    dtype: ActivationDtype = jnp.float32

    def __post_init__(self) -> None:
        if self.channels % self.head_dim:
            given = "expand * width" if self.inner is None else "inner"
            raise ValueError(
                f"head_dim={self.head_dim} does not divide {given} = {self.channels}; choose one that does"
            )
        if self.heads % self.groups:
            raise ValueError(f"groups={self.groups} does not divide the {self.heads} heads")
        if not 0 < self.a_min <= self.a_max:
            raise ValueError(f"a_min={self.a_min}, a_max={self.a_max}; expected 0 < a_min <= a_max")
        check_steps(self.dt_min, self.dt_max)
        if not 0 <= self.dt_limit[0] < self.dt_limit[1]:
            raise ValueError(f"dt_limit={self.dt_limit}; expected 0 <= lower < upper")

    @property
    def channels(self) -> int:
        """Number of channels of the state space."""
        return self.expand * self.width if self.inner is None else self.inner

    @property
    def heads(self) -> int:
        """Number of heads, each with one decay."""
        return self.channels // self.head_dim


class Mamba2Carry(NamedTuple):
    """What `Mamba2` carries: the last inputs of the short convolution, and the state S (b, h, n, p) or that of a variant."""

    inputs: Float[Array, "b taps channels"]
    s: Any


class Mamba2(Mixer):
    """Mamba-2's block, with e = expand d channels in h heads of p inside.

        [z, u, B, C, dt] = W_in x                                        (e, e, g n, g n, h)
        [u, B, C] = silu(short_conv([u, B, C]))
        dt_t = softplus(dt_t + b_dt), clipped to dt_limit                (h)
        S_t  = exp(-dt_t exp(log_a)) S_{t-1} + B_t (dt_t u_t)^T          (n x p, per head)
        y    = W_out RMSNorm((S_t^T C_t + D u_t) silu(z))

    `least_step` (h), if not None, skips tokens by head: where dt_t <= least_step, dt_t = 0, which leaves the state as it is
    (LongMamba; see `seqmodels.lengthen`).

    Head i reads group i // (h / g) of B and C. The gate precedes the norm, which is over the e / g channels of a group, unless
    `norm` says otherwise.
    """

    def __init__(self, config: Mamba2Config, *, rngs: nnx.Rngs):
        self.config = config
        channels, heads, shared = config.channels, config.heads, config.groups * config.state_size
        options = {"dtype": config.dtype, "rngs": rngs}
        features = 2 * (channels + shared) + heads
        self.input = linear(config.width, features, axes=("embed", "inner"), bias=config.bias, **options)
        self.convolution = ShortConvolution(
            channels + 2 * shared, config.taps, bias=config.conv_bias, **options
        )
        steps = step_size_bias(config.dt_min, config.dt_max, config.dt_floor)
        ones, by_head = nnx.initializers.ones_init(), {"axes": ("heads",), **NO_DECAY}
        self.dt_bias = parameter(rngs, steps, (heads,), **by_head)
        self.log_a = parameter(rngs, log_of_uniform(config.a_min, config.a_max), (heads,), **by_head)
        self.d = parameter(rngs, ones, (heads,), **by_head)
        self.least_step: nnx.Variable | None = nnx.data(None)
        self.scale = (
            parameter(rngs, ones, (channels,), axes=("inner",), **NO_DECAY) if config.norm != "none" else None
        )
        # Divided by the root of the number of layers that add to the residual.
        small = uniform_fan_in(config.depth**-0.5)
        self.output = linear(
            channels, config.width, axes=("inner", "embed"), bias=config.bias, init=small, **options
        )

    def initial(self, batch_size: int, max_length: int | None) -> Mamba2Carry:
        config = self.config
        shape = (batch_size, config.heads, config.state_size, config.head_dim)
        return Mamba2Carry(self.convolution.init_state(batch_size), jnp.zeros(shape, jnp.float32))

    def mix(
        self, x: Float[Array, "b t d"], carried: Mamba2Carry | None, segments: Segments | None
    ) -> tuple[Float[Array, "b t d"], Mamba2Carry]:
        config = self.config
        inputs, s = (None, None) if carried is None else carried
        b, t = x.shape[:2]
        channels, shared = config.channels, config.groups * config.state_size
        gate, mixed, dt = self.project(x)
        if self.least_step is not None:
            dt = jnp.where(dt > self.least_step[...][None, None], dt, 0)
        mixed, inputs = self.convolution(mixed, inputs, segment_ids=segments)
        u, key, query = jnp.split(mixed, [channels, channels + shared], axis=-1)
        u = u.reshape(b, t, config.heads, config.head_dim)
        key, query = (v.reshape(b, t, config.groups, config.state_size) for v in (key, query))
        value = (dt[..., None] * u).astype(config.dtype)
        y, s = self._read(x, query, key, value, -jnp.exp(self.log_a[...])[None, None] * dt, s, segments)
        y = y.astype(jnp.float32) + self.d[...][None, None, :, None] * u
        y, gate = y.reshape(b, t, channels), jax.nn.silu(gate.astype(jnp.float32))
        y = self._norm(y) * gate if config.norm == "before" else self._norm(y * gate)
        return self.output(y), Mamba2Carry(inputs, s)

    def project(
        self, x: Float[Array, "b t d"]
    ) -> tuple[Float[Array, "b t e"], Float[Array, "b t c"], Float[Array, "b t h"]]:
        """Returns z, [u, B, C] before the short convolution, and the step sizes dt, float32."""
        config = self.config
        channels, shared = config.channels, config.groups * config.state_size
        sizes = (channels, channels + 2 * shared, config.heads)
        gate, mixed, dt = project(self.input, x, sizes)
        if config.scales != (1.0,) * 5:
            counts = np.array([channels, channels, shared, shared, config.heads])
            factors = jnp.asarray(np.repeat(config.scales, counts), config.dtype)[None, None]
            parts = jnp.split(factors, np.cumsum(sizes)[:-1], axis=-1)
            gate, mixed, dt = (part * factor for part, factor in zip((gate, mixed, dt), parts, strict=True))
        dt = jax.nn.softplus(dt.astype(jnp.float32) + self.dt_bias[...][None, None])
        return gate, mixed, jnp.clip(dt, *config.dt_limit)

    def _read(self, x, query, key, value, log_decay, s, segments):
        """Returns what the queries read in the memory, and its state after the last token."""
        return gated_linear_attention(
            query, key, value, log_decay=log_decay, scale=1.0, initial_state=s, segment_ids=segments
        )

    def _norm(self, y: jax.Array) -> jax.Array:
        """Divides the channels of each group by their root mean square, and scales them, if there is a norm."""
        if self.scale is None:
            return y
        groups = self.config.groups
        grouped = y.reshape(*y.shape[:2], groups, self.config.channels // groups)
        inverse = jax.lax.rsqrt(jnp.square(grouped).mean(-1, keepdims=True) + self.config.epsilon)
        return (grouped * inverse).reshape(y.shape) * self.scale[...][None, None]
