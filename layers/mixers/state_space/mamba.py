"""Mamba: a gated state space whose step, input and output depend on the token (Gu and Dao 2023, arXiv:2312.00752)."""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx

from layers.kernels.selective_scan import selective_scan
from layers.mixer import Mixer
from layers.norms import NormConfig, RMSNorm
from layers.options import ActivationDtype, NonNegative, checked_dataclass
from layers.parameters import NO_DECAY, declared, linear, parameter, uniform_fan_in
from layers.parts.projection import project
from layers.parts.short_convolution import ShortConvolution
from layers.parts.state_space import SelectiveSizes, check_steps
from layers.parts.step_size import step_size_bias
from layers.segments import Segments
from layers.typing import Array, Float


@checked_dataclass
class MambaConfig(SelectiveSizes):
    """Options of `Mamba`.

    Attributes:
      width: d, number of input and output features.
      state_size: n, number of states per channel.
      expand: number of channels of the state space as a multiple of width.
      taps: w, number of inputs that the short convolution sees.
      dt_rank: rank of the map to step sizes; width / 16, rounded up, if None.
      dt_min, dt_max: range of the initial step sizes, log-uniform.
      dt_floor: lower bound of the initial step sizes.
      conv_bias: whether the short convolution has a bias.
      bias: whether the outer projections have biases.
      inner_norm: whether r, B and C of each token are normalized, as in Jamba.
      epsilon: epsilon of these norms.
      depth: number of layers of the model; the initial output projection is divided by its root.
      dtype: dtype of the activations; the state is float32.
    """

    width: int
    state_size: int = 16
    expand: int = 2
    taps: int = 4
    dt_rank: int | None = None
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_floor: NonNegative = 1e-4
    conv_bias: bool = True
    bias: bool = False
    inner_norm: bool = False
    epsilon: NonNegative = 1e-6
    depth: int = 1
    dtype: ActivationDtype = jnp.float32

    def __post_init__(self) -> None:
        check_steps(self.dt_min, self.dt_max)


class MambaCarry(NamedTuple):
    """What `Mamba` carries: the last inputs of the short convolution, and the state h."""

    inputs: Float[Array, "b taps d"]
    h: Float[Array, "b d n"]


class Mamba(Mixer):
    """Mamba's block, with e = expand d channels inside.

        [u, z] = W_in x                                       (e, e)
        u      = silu(short_conv(u))
        [r, B_t, C_t] = W_x u                                 (rank, n, n)
        dt_t   = softplus(W_dt r + b_dt)                      (e)
        h_t    = exp(dt_t A) h_{t-1} + (dt_t u_t) B_t^T       (e x n)
        y      = W_out ((h_t C_t + D u_t) silu(z))

    A = -exp(log_a) starts as -1, ..., -n in every channel, D as one. The decay is discretized exactly and the input by
    the step size times B, as in the authors' code; the paper writes zero-order hold for both. With `inner_norm`, r, B_t
    and C_t each pass through an RMSNorm, which keeps large models stable (Jamba, Lieber et al. 2024, arXiv:2403.19887).
    """

    def __init__(self, config: MambaConfig, *, rngs: nnx.Rngs):
        self.config = config
        channels, size = config.channels, config.state_size
        options = {"dtype": config.dtype, "rngs": rngs}
        self.input = linear(config.width, 2 * channels, axes=("embed", "inner"), bias=config.bias, **options)
        self.convolution = ShortConvolution(channels, config.taps, bias=config.conv_bias, **options)
        self._make_selection(rngs)
        own = {"axes": ("inner",), **NO_DECAY}
        steps = step_size_bias(config.dt_min, config.dt_max, config.dt_floor)
        self.dt_bias = parameter(rngs, steps, (channels,), **own)
        rates = jnp.broadcast_to(jnp.log(jnp.arange(1.0, size + 1)), (channels, size))
        self.log_a = declared(rates.astype(jnp.float32), axes=("inner", "state"), **NO_DECAY)
        self.d = parameter(rngs, nnx.initializers.ones_init(), (channels,), **own)
        # Divided by the root of the number of layers that add to the residual.
        small = uniform_fan_in(config.depth**-0.5)
        self.output = linear(
            channels, config.width, axes=("inner", "embed"), bias=config.bias, init=small, **options
        )

    def _make_selection(self, rngs: nnx.Rngs) -> None:
        """Makes the maps that `_select` applies."""
        config, rank, size = self.config, self.config.rank, self.config.state_size
        options = {"bias": False, "dtype": config.dtype, "rngs": rngs}
        self.selection = linear(config.channels, rank + 2 * size, axes=("inner", None), **options)
        norms = [NormConfig(features, config.epsilon, dtype=config.dtype) for features in (rank, size, size)]
        self.inner_norms = (
            nnx.List([RMSNorm(norm, rngs=rngs) for norm in norms]) if config.inner_norm else None
        )
        self.dt = linear(rank, config.channels, axes=(None, "inner"), init=uniform_fan_in(), **options)

    def _select(
        self, u: Float[Array, "b t d"]
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b t g n"], Float[Array, "b t g n"]]:
        """Returns step sizes before their bias, inputs B and outputs C, each of the latter for groups of channels."""
        config, size = self.config, self.config.state_size
        selected = jnp.split(self.selection(u), [config.rank, config.rank + size], axis=-1)
        if self.inner_norms is not None:
            selected = [norm(part) for norm, part in zip(self.inner_norms, selected, strict=True)]
        r, b, c = selected
        return self.dt(r), b[:, :, None], c[:, :, None]

    def initial(self, batch_size: int, max_length: int | None) -> MambaCarry:
        shape = (batch_size, self.config.channels, self.config.state_size)
        return MambaCarry(self.convolution.init_state(batch_size), jnp.zeros(shape, jnp.float32))

    def mix(
        self, x: Float[Array, "b t d"], carried: MambaCarry | None, segments: Segments | None
    ) -> tuple[Float[Array, "b t d"], MambaCarry]:
        inputs, h = (None, None) if carried is None else carried
        read, inputs = self.read(x, inputs, segments)
        y, h = self.scan(*read, h, segments)
        return y, MambaCarry(inputs, h)

    def read(
        self, x: Float[Array, "b t d"], inputs: Float[Array, "b taps e"] | None, segments: Segments | None
    ) -> tuple[tuple[Float[Array, "b t *_f"], ...], Float[Array, "b taps e"]]:
        """Returns what the scan takes of each token, u, z, dt before its bias, B and C, and the last inputs of the convolution."""
        u, gate = project(self.input, x, (self.config.channels, self.config.channels))
        u, inputs = self.convolution(u, inputs, segment_ids=segments)
        return (u, gate, *self._select(u)), inputs

    def scan(
        self,
        u: Float[Array, "b t e"],
        gate: Float[Array, "b t e"],
        dt: Float[Array, "b t e"],
        b: Float[Array, "b t g n"],
        c: Float[Array, "b t g n"],
        h: Float[Array, "b e n"] | None,
        segments: Segments | None,
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b e n"]]:
        """Returns the outputs of tokens, and the state after them."""
        options = {"skip": self.d[...], "gate": gate, "dt_bias": self.dt_bias[...], "dt_softplus": True}
        rate = -jnp.exp(self.log_a[...])
        y, h = selective_scan(u, dt, rate, b, c, initial_state=h, segment_ids=segments, **options)
        return self.output(y), h
